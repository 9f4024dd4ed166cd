"""Functions that LLVM calls on 32-bit ARM for what has no instruction, in LLVM IR.

Their names and conventions (floats in integer registers) are those of ARM's run-time ABI: 64-bit
division, and 64-bit integers to floating point. Kernels call them a few times each, never in their
inner loops.
"""

HELPERS = """
define internal { i64, i64 } @divide(i64 %n, i64 %d) noinline {
entry:
  br label %next
next:
  %i = phi i32 [ 0, %entry ], [ %i1, %next ]
  %rest = phi i64 [ %n, %entry ], [ %rest1, %next ]
  %r = phi i64 [ 0, %entry ], [ %r1, %next ]
  %q = phi i64 [ 0, %entry ], [ %q1, %next ]
  %top = lshr i64 %rest, 63
  %rest1 = shl i64 %rest, 1
  %doubled = shl i64 %r, 1
  %low = or i64 %doubled, %top
  %carry = icmp slt i64 %r, 0
  %more = icmp uge i64 %low, %d
  %take = or i1 %carry, %more
  %less = sub i64 %low, %d
  %r1 = select i1 %take, i64 %less, i64 %low
  %bit = zext i1 %take to i64
  %shifted = shl i64 %q, 1
  %q1 = or i64 %shifted, %bit
  %i1 = add i32 %i, 1
  %done = icmp eq i32 %i1, 64
  br i1 %done, label %end, label %next
end:
  %a = insertvalue { i64, i64 } poison, i64 %q1, 0
  %b = insertvalue { i64, i64 } %a, i64 %r1, 1
  ret { i64, i64 } %b
}

; Quotient and remainder, in r0 to r3.
define hidden { i64, i64 } @__aeabi_uldivmod(i64 %n, i64 %d) noinline {
  %both = call { i64, i64 } @divide(i64 %n, i64 %d)
  ret { i64, i64 } %both
}

define hidden { i64, i64 } @__aeabi_ldivmod(i64 %n, i64 %d) noinline {
  %n_sign = ashr i64 %n, 63
  %d_sign = ashr i64 %d, 63
  %n_flip = xor i64 %n, %n_sign
  %d_flip = xor i64 %d, %d_sign
  %n_size = sub i64 %n_flip, %n_sign
  %d_size = sub i64 %d_flip, %d_sign
  %both = call { i64, i64 } @divide(i64 %n_size, i64 %d_size)
  %q_size = extractvalue { i64, i64 } %both, 0
  %r_size = extractvalue { i64, i64 } %both, 1
  %q_sign = xor i64 %n_sign, %d_sign
  %q_flip = xor i64 %q_size, %q_sign
  %q = sub i64 %q_flip, %q_sign
  %r_flip = xor i64 %r_size, %n_sign
  %r = sub i64 %r_flip, %n_sign
  %a = insertvalue { i64, i64 } poison, i64 %q, 0
  %b = insertvalue { i64, i64 } %a, i64 %r, 1
  ret { i64, i64 } %b
}

define internal double @upper_and_lower(double %upper, i64 %v) noinline {
  %low = trunc i64 %v to i32
  %lower = uitofp i32 %low to double
  %scaled = fmul double %upper, 4294967296.0
  %sum = fadd double %scaled, %lower
  ret double %sum
}

define hidden arm_aapcscc double @__aeabi_l2d(i64 %v) noinline {
  %wide = ashr i64 %v, 32
  %high = trunc i64 %wide to i32
  %upper = sitofp i32 %high to double
  %r = call double @upper_and_lower(double %upper, i64 %v)
  ret double %r
}

define hidden arm_aapcscc double @__aeabi_ul2d(i64 %v) noinline {
  %wide = lshr i64 %v, 32
  %high = trunc i64 %wide to i32
  %upper = uitofp i32 %high to double
  %r = call double @upper_and_lower(double %upper, i64 %v)
  ret double %r
}

; Bits that a double drops must still decide how a float is rounded: they are gathered in one.
define internal i64 @gathered(i64 %v) noinline {
  %above = add i64 %v, 9007199254740992
  %large = icmp ugt i64 %above, 18014398509481984
  %bits = and i64 %v, 2047
  %some = icmp ne i64 %bits, 0
  %lossy = and i1 %large, %some
  %kept = and i64 %v, -2048
  %marked = or i64 %kept, 2048
  %r = select i1 %lossy, i64 %marked, i64 %v
  ret i64 %r
}

define hidden arm_aapcscc float @__aeabi_l2f(i64 %v) noinline {
  %safe = call i64 @gathered(i64 %v)
  %wide = call arm_aapcscc double @__aeabi_l2d(i64 %safe)
  %r = fptrunc double %wide to float
  ret float %r
}

define hidden arm_aapcscc float @__aeabi_ul2f(i64 %v) noinline {
  %safe = call i64 @gathered(i64 %v)
  %wide = call arm_aapcscc double @__aeabi_ul2d(i64 %safe)
  %r = fptrunc double %wide to float
  ret float %r
}

; Tables for unwinding the stack name it; kernels raise nothing, so nobody calls it.
define hidden void @__aeabi_unwind_cpp_pr0() {
  ret void
}
"""
