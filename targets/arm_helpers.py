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

; The nearest float, of even mantissa in the middle: the highest bit goes to bit 63, and what is
; rounded up carries into the exponent.
define internal i32 @nearest_float(i64 %v) noinline {
  %zero = icmp eq i64 %v, 0
  %zeros = call i64 @llvm.ctlz.i64(i64 %v, i1 false)
  %places = and i64 %zeros, 63
  %high = shl i64 %v, %places
  %kept = lshr i64 %high, 40
  %rest = and i64 %high, 1099511627775
  %odd = and i64 %kept, 1
  %tie = sub i64 549755813888, %odd
  %up = icmp ugt i64 %rest, %tie
  %one = zext i1 %up to i64
  %mantissa = add i64 %kept, %one
  %exponent = sub i64 189, %zeros
  %shifted = shl i64 %exponent, 23
  %bits = add i64 %shifted, %mantissa
  %found = select i1 %zero, i64 0, i64 %bits
  %r = trunc i64 %found to i32
  ret i32 %r
}

declare i64 @llvm.ctlz.i64(i64, i1)

define hidden arm_aapcscc float @__aeabi_ul2f(i64 %v) noinline {
  %bits = call i32 @nearest_float(i64 %v)
  %r = bitcast i32 %bits to float
  ret float %r
}

define hidden arm_aapcscc float @__aeabi_l2f(i64 %v) noinline {
  %sign = ashr i64 %v, 63
  %flipped = xor i64 %v, %sign
  %size = sub i64 %flipped, %sign
  %bits = call i32 @nearest_float(i64 %size)
  %low = trunc i64 %sign to i32
  %top = and i32 %low, -2147483648
  %signed = or i32 %bits, %top
  %r = bitcast i32 %signed to float
  ret float %r
}

; Tables for unwinding the stack name it; kernels raise nothing, so nobody calls it.
define hidden void @__aeabi_unwind_cpp_pr0() {
  ret void
}
"""

# What chips without doubles never need.
OF_DOUBLES = """
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
"""

# What LLVM calls of memory where there is no system; the number says what it knows to be aligned.
OF_MEMORY = "".join(
    f"""
define hidden void @__aeabi_memclr{n}(ptr %to, i32 %n) "no-builtins" {{
  %end = call ptr @memset(ptr %to, i32 0, i32 %n)
  ret void
}}

define hidden void @__aeabi_memset{n}(ptr %to, i32 %n, i32 %value) "no-builtins" {{
  %end = call ptr @memset(ptr %to, i32 %value, i32 %n)
  ret void
}}

define hidden void @__aeabi_memcpy{n}(ptr %to, ptr %from, i32 %n) "no-builtins" {{
  %end = call ptr @memcpy(ptr %to, ptr %from, i32 %n)
  ret void
}}
"""
    for n in ("", "4", "8")
)
