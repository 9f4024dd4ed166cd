"""What an executable does, as one more kernel: read the arguments, run the model, print the text.

Its argument block is written by `headrace.standalone.program`; `SLOTS` names the slots.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.execute import walk
from headrace.plan import COUNT, ONE, OUT_COUNT, OUT_FIRST, POSITION, SHORT_TOKENS
from headrace.targets.simd import (
    arg_int,
    arg_ptr,
    call_kernel,
    get_f32,
    get_i64,
    get_u8,
    get_u32,
    int_to_ptr,
    ptr_to_int,
    put_i64,
    put_u8,
    smaller,
)
from headrace.targets.table import Kernel, KernelFunction, no_cases

SLOTS = (
    "stack",  # as Linux hands it over: the number of arguments, then their addresses
    "decode",  # jobs of `headrace.kernels.execute`
    "short",
    "prefill",
    "state",
    "ids",
    "logits",
    "vocabulary",
    "context",
    "chunk",
    "pieces",  # uint32 [vocabulary + 1]: where each token's bytes begin in `text`
    "text",
    "flags",  # uint8 [vocabulary], see below
    "ends",  # int64: tokens that end a text
    "n_ends",
    "prompt",  # int64 [context]
    "digits",  # room for a number's text
    "write",  # kernels: write(file, address, bytes) and exit(status)
    "exit",
    "request",  # room for their arguments
    "option_ids",  # texts that end with a zero byte
    "option_n",
    "option_print_ids",
    "option_help",
    "usage",
    "unknown",
    "no_value",
    "bad_ids",
    "bad_n",
    "too_long",
    "newline",
)
(
    _STACK, _DECODE, _SHORT, _PREFILL, _STATE, _IDS, _LOGITS, _VOCABULARY, _CONTEXT, _CHUNK,
    _PIECES, _TEXT, _FLAGS, _ENDS, _N_ENDS, _PROMPT, _DIGITS, _WRITE, _EXIT, _REQUEST, _OPTION_IDS,
    _OPTION_N, _OPTION_PRINT_IDS, _OPTION_HELP, _USAGE, _UNKNOWN, _NO_VALUE, _BAD_IDS, _BAD_N,
    _TOO_LONG, _NEWLINE,
) = range(len(SLOTS))  # fmt: skip

# Flags: after a token of the first kind, one of the second drops its first byte, a space.
DROPS_SPACE_AFTER, BEGINS_WITH_SPACE = 1, 2
DEFAULT_TOKENS = 16
USAGE_STATUS = 2
DIGITS = 24  # bytes of the longest number
_MOST = 1 << 31  # numbers on the command line lie below


def _same(a: Any, b: Any) -> Any:
    i = 0
    while get_u8(a + i) == get_u8(b + i) and get_u8(a + i) != 0:
        i += 1
    return get_u8(a + i) == get_u8(b + i)


def _numbers(text: Any, out: Any, most: Any) -> Any:
    """Numbers with commas between them to int64 `out`; how many, or -1 if it is something else."""
    count = 0
    value = 0
    digits = 0
    good = True
    i = 0
    ended = False
    while good and not ended:
        letter = get_u8(text + i)
        if letter >= 48 and letter <= 57:
            value = value * 10 + (letter - 48)
            digits += 1
            good = value < _MOST
        else:
            ended = letter == 0
            good = digits > 0 and (ended or letter == 44) and count < most
            if good:
                put_i64(out + count * 8, value)
            count += 1
            value = 0
            digits = 0
        i += 1
    if not good:
        count = -1
    return count


def _say(args: Any, file: Any, text: Any, n: Any) -> None:
    request = arg_ptr(args, _REQUEST)
    put_i64(request, file)
    put_i64(request + 8, ptr_to_int(text))
    put_i64(request + 16, n)
    call_kernel(arg_ptr(args, _WRITE), request, 0, 1)


def _end(args: Any, status: Any) -> None:
    request = arg_ptr(args, _REQUEST)
    put_i64(request, status)
    call_kernel(arg_ptr(args, _EXIT), request, 0, 1)


def _say_text(args: Any, file: Any, text: Any) -> None:
    n = 0
    while get_u8(text + n) != 0:
        n += 1
    _say(args, file, text, n)


def _fail(args: Any, message: Any) -> None:
    _say_text(args, 2, message)
    _end(args, USAGE_STATUS)


def _fail_at(args: Any, option: Any, message: Any) -> None:
    _say_text(args, 2, option)
    _say_text(args, 2, message)
    _fail(args, arg_ptr(args, _USAGE))


def _show_number(args: Any, value: Any, first: Any) -> None:
    end = arg_ptr(args, _DIGITS) + DIGITS
    n = 0
    while value > 0 or n == 0:
        n += 1
        put_u8(end + (0 - n), 48 + value % 10)
        value = value // 10
    if not first:
        n += 1
        put_u8(end + (0 - n), 44)
    _say(args, 1, end + (0 - n), n)


def _show(args: Any, token: Any, after: Any) -> None:
    flags = arg_ptr(args, _FLAGS)
    pieces = arg_ptr(args, _PIECES)
    begin = get_u32(pieces + token * 4)
    end = get_u32(pieces + token * 4 + 4)
    if (get_u8(flags + after) & DROPS_SPACE_AFTER) != 0 and (
        get_u8(flags + token) & BEGINS_WITH_SPACE
    ) != 0:
        begin += 1
    if end > begin:
        _say(args, 1, arg_ptr(args, _TEXT) + begin, end - begin)


def _likeliest(logits: Any, n: Any) -> Any:
    best = 0
    most = get_f32(logits)
    for i in range(1, n):
        value = get_f32(logits + i * 4)
        if value > most:
            most = value
            best = i
    return best


def _is_end(args: Any, token: Any) -> Any:
    found = False
    for i in range(arg_int(args, _N_ENDS)):
        if get_i64(arg_ptr(args, _ENDS) + i * 8) == token:
            found = True
    return found


def _read(args: Any, n: Any, position: Any) -> None:
    """Run the n tokens in the buffer of ids, which stand at `position`."""
    state = arg_ptr(args, _STATE)
    put_i64(state + COUNT * 8, n)
    put_i64(state + POSITION * 8, position)
    put_i64(state + OUT_FIRST * 8, n - 1)
    put_i64(state + OUT_COUNT * 8, 1)
    put_i64(state + ONE * 8, 1)
    job = arg_int(args, _PREFILL)
    if n <= SHORT_TOKENS:
        job = arg_int(args, _SHORT)
    if n == 1:
        job = arg_int(args, _DECODE)
    walk(int_to_ptr(job), 0, 1)


def _driver(word_bytes: int) -> KernelFunction:
    def driver(args: Any, thread: Any, n_threads: Any) -> None:
        stack = arg_ptr(args, _STACK)
        prompt = arg_ptr(args, _PROMPT)
        context = arg_int(args, _CONTEXT)
        size = arg_int(args, _VOCABULARY)
        n_arguments = get_u32(stack)
        count = 0
        wanted = DEFAULT_TOKENS
        numbers = False
        i = 1
        while i < n_arguments:
            here = _word(stack + i * word_bytes + word_bytes, word_bytes)
            # Behind the last argument there is a zero: an option without its value is one too.
            after = _word(stack + i * word_bytes + 2 * word_bytes, word_bytes)
            option = int_to_ptr(here)
            is_ids = _same(option, arg_ptr(args, _OPTION_IDS))
            is_n = _same(option, arg_ptr(args, _OPTION_N))
            if _same(option, arg_ptr(args, _OPTION_HELP)):
                _say_text(args, 1, arg_ptr(args, _USAGE))
                _end(args, 0)
            elif _same(option, arg_ptr(args, _OPTION_PRINT_IDS)):
                numbers = True
                i += 1
            elif (is_ids or is_n) and after == 0:
                _fail_at(args, option, arg_ptr(args, _NO_VALUE))
            elif is_ids:
                count = _numbers(int_to_ptr(after), prompt, context - 1)
                if count < 0:
                    _fail(args, arg_ptr(args, _BAD_IDS))
                i += 2
            elif is_n:
                if _numbers(int_to_ptr(after), arg_ptr(args, _IDS), 1) != 1:
                    _fail(args, arg_ptr(args, _BAD_N))
                wanted = get_i64(arg_ptr(args, _IDS))
                i += 2
            else:
                _fail_at(args, option, arg_ptr(args, _UNKNOWN))
        if count == 0:
            _fail(args, arg_ptr(args, _USAGE))
        for j in range(count):
            if get_i64(prompt + j * 8) >= size:
                _fail(args, arg_ptr(args, _BAD_IDS))
        if count + wanted > context:
            _fail(args, arg_ptr(args, _TOO_LONG))

        ids = arg_ptr(args, _IDS)
        logits = arg_ptr(args, _LOGITS)
        position = 0
        while position < count:
            n = smaller(arg_int(args, _CHUNK), count - position)
            for j in range(n):
                put_i64(ids + j * 8, get_i64(prompt + (position + j) * 8))
            _read(args, n, position)
            position += n
        last = get_i64(prompt + (count - 1) * 8)
        shown = 0
        while shown < wanted:
            token = _likeliest(logits, size)
            if _is_end(args, token):
                wanted = shown
            else:
                if numbers:
                    _show_number(args, token, shown == 0)
                else:
                    _show(args, token, last)
                last = token
                shown += 1
                if shown < wanted:
                    put_i64(ids, token)
                    _read(args, 1, position)
                    position += 1
        _say(args, 1, arg_ptr(args, _NEWLINE), 1)
        _end(args, 0)

    return driver


def _word(p: Any, word_bytes: int) -> Any:
    if word_bytes == 4:
        return get_u32(p)
    return get_i64(p)


ROW = Kernel(
    "standalone",
    lambda target: _driver(target.word_bytes),
    (__name__, "headrace.kernels.execute", "headrace.offload.requests", "headrace.plan"),
    no_cases,  # tests/emulated/test_standalone.py runs it
    __name__,
)


def kernel_named(name: str) -> Kernel:
    """The row of this name, for processes that compile it."""
    return {ROW.name: ROW}[name]
