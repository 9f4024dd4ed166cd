"""The thread team: barriers, parking, cancelling, Ctrl-C and closing."""

from __future__ import annotations

import _thread
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headrace import interruptible as aside
from headrace.errors import HeadraceError
from headrace.kernels import execute
from headrace.kernels.invoke import argument_block
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.targets.simd import arg_int, arg_ptr, get_i64, put_i64
from headrace.targets.table import Case, Kernel
from headrace.targets.target import Target
from headrace.team import Team, default_threads
from headrace.trace import Trace

N = 240  # a multiple of no number of threads beyond 6, so that shares differ with 7
ROUNDS = 300
QUICK_S = 0.5  # the machine may be busy; a hang is for ever


def shift(args: Any, thread: Any, n_threads: Any) -> None:
    """to[i] = from[i + 1] + 1, all around: every share needs another thread's last result.

    Slots: 0 from, 1 to (int64), 2 their length, 3 how often to do it.
    """
    source = arg_ptr(args, 0)
    to = arg_ptr(args, 1)
    n = arg_int(args, 2)
    for _ in range(arg_int(args, 3)):
        for i in range(n * thread // n_threads, n * (thread + 1) // n_threads):
            put_i64(to + i * 8, get_i64(source + (i + 1) % n * 8) + 1)


def _no_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    return iter(())


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, int]]:
    kernel = Kernel("test_shift", lambda target: shift, (__name__,), _no_cases)
    store = KernelStore(pick_target(None))  # owns the code
    yield store.load([*execute.kernels().values(), kernel])
    del store


class Job:
    """Steps that shift an array around and around."""

    def __init__(self, addresses: dict[str, int], rounds: int = ROUNDS, repeat: int = 1) -> None:
        self.rounds = rounds
        self.arrays = [np.zeros(N, np.int64), np.zeros(N, np.int64)]
        a, b = self.arrays
        self.blocks = [argument_block([a, b, N, repeat]), argument_block([b, a, N, repeat])]
        self.steps = np.zeros((rounds, execute.STEP_SLOTS), np.int64)
        self.steps[:, 0] = addresses["test_shift"]
        self.steps[0::2, 1] = self.blocks[0].ctypes.data
        self.steps[1::2, 1] = self.blocks[1].ctypes.data
        self.steps[:, 2] = execute.STEP_BARRIER
        self.reset()

    def reset(self) -> None:
        self.arrays[0][:] = np.arange(N) * 1000
        self.arrays[1][:] = -1

    def check(self) -> None:
        found = self.arrays[self.rounds % 2]
        assert np.array_equal(found, (np.arange(N) + self.rounds) % N * 1000 + self.rounds)

    def run(self, team: Team, **options: Any) -> None:
        self.reset()
        assert team.run(self.steps, **options)
        self.check()


@pytest.fixture
def make_team(addresses: dict[str, int]) -> Iterator[Callable[[int], Team]]:
    teams: list[Team] = []

    def make(n_threads: int) -> Team:
        teams.append(Team(addresses, n_threads))
        return teams[-1]

    yield make
    for team in teams:
        team.close()
    assert not [t for team in teams for t in team._threads if t.is_alive()]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4, 5, 6, 7])
def test_barriers(
    addresses: dict[str, int], make_team: Callable[[int], Team], n_threads: int
) -> None:
    team = make_team(n_threads)
    assert team.n_threads == n_threads
    job, odd = Job(addresses), Job(addresses, rounds=7)
    for _ in range(10):
        job.run(team)
        odd.run(team)
        job.run(team, interruptible=True)


def test_two_teams_at_once(addresses: dict[str, int], make_team: Callable[[int], Team]) -> None:
    failed: list[BaseException] = []

    def work(team: Team, job: Job) -> None:
        try:
            for _ in range(20):
                job.run(team)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(make_team(3), Job(addresses))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_steps_without_barriers_run_once_on_each_thread(
    addresses: dict[str, int], make_team: Callable[[int], Team]
) -> None:
    team = make_team(4)
    jobs = [Job(addresses, rounds=1) for _ in range(50)]
    steps = np.concatenate([job.steps for job in jobs])
    steps[:, 2] = 0
    for job in jobs:
        job.reset()
    assert team.run(steps)
    for job in jobs:
        job.check()


def test_no_steps(make_team: Callable[[int], Team]) -> None:
    team = make_team(3)
    for _ in range(5):
        assert team.run(np.zeros((0, execute.STEP_SLOTS), np.int64))


def test_ticks(addresses: dict[str, int], make_team: Callable[[int], Team]) -> None:
    team, job = make_team(2), Job(addresses)
    ticks = np.zeros(job.rounds + 1, np.int64)
    job.run(team, ticks=ticks)
    assert (ticks > 0).all()
    assert (np.diff(ticks) >= 0).all()
    before = ticks.copy()
    job.run(team)
    assert np.array_equal(ticks, before)  # asked for once, not for ever


def test_ticks_of_a_cancelled_job_have_no_end(
    addresses: dict[str, int], make_team: Callable[[int], Team]
) -> None:
    team, long = make_team(2), Job(addresses, rounds=20_000, repeat=50)
    ticks = np.zeros(long.rounds + 1, np.int64)
    thread = threading.Thread(target=team.run, args=(long.steps,), kwargs={"ticks": ticks})
    thread.start()
    wait_until(lambda: bool(ticks[1]))
    team.cancel()
    thread.join()
    assert ticks[-1] == 0


def test_the_trace_leaves_out_cancelled_runs(capsys: pytest.CaptureFixture[str]) -> None:
    trace = Trace()
    program = SimpleNamespace(kernels=("k", "k"), sizes=np.zeros(2, np.int64))
    for ends in (300, 0, 300):
        with trace.measure(program) as ticks:  # type: ignore[arg-type]
            ticks[:] = [100, 200, ends]
            if not ends:
                time.sleep(0.2)  # a long wait that is no part of what completed runs took
    trace.report()
    shown = capsys.readouterr().err
    assert "run 2 times" in shown
    assert float(re.search(r"mean (\S+) ms", shown)[1]) < 50  # type: ignore[index]
    assert "-" not in shown  # no negative times


def test_idle_threads_park_and_wake(
    addresses: dict[str, int], make_team: Callable[[int], Team]
) -> None:
    team, job = make_team(4), Job(addresses, rounds=20)
    wait_until(lambda: len(team._parked) == 3)  # never had a job
    job.run(team)
    for _ in range(5):
        wait_until(lambda: len(team._parked) == 3)
        cpu, begin = time.process_time(), time.monotonic()
        time.sleep(0.05)
        assert time.process_time() - cpu < 0.5 * (time.monotonic() - begin)
        job.run(team)
    # Around the moment at which threads park.
    rng = np.random.default_rng(0)
    for pause in rng.uniform(0, 0.008, 200):
        time.sleep(float(pause))
        job.run(team)


def test_cancel(addresses: dict[str, int], make_team: Callable[[int], Team]) -> None:
    team, job = make_team(4), Job(addresses)
    team.cancel()  # nothing runs: nothing is remembered
    job.run(team)
    long = Job(addresses, rounds=200_000, repeat=50)  # minutes
    rng = np.random.default_rng(0)
    for interruptible in (False, True) * 15:
        results: list[bool] = []
        thread = threading.Thread(
            target=lambda i=interruptible, r=results: r.append(
                team.run(long.steps, interruptible=i)
            )
        )
        generation = int(team._shared[execute.GENERATION])
        thread.start()
        wait_until(lambda g=generation: team._shared[execute.GENERATION] != g)
        time.sleep(float(rng.uniform(0, 0.01)))
        begin = time.monotonic()
        team.cancel()
        thread.join()
        assert time.monotonic() - begin < QUICK_S
        assert results == [False]
        job.run(team)


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends the process on Windows")
def test_ctrl_c_within_a_job(addresses: dict[str, int], make_team: Callable[[int], Team]) -> None:
    team, job = make_team(3), Job(addresses)
    long = Job(addresses, rounds=200_000, repeat=50)
    for _ in range(3):
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        begin = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            team.run(long.steps, interruptible=True)
        assert time.monotonic() - begin < 0.1 + QUICK_S
        timer.join()
        job.run(team)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX timers")
@pytest.mark.parametrize("parked", [False, True])
def test_interrupts_at_any_instruction(
    addresses: dict[str, int], make_team: Callable[[int], Team], parked: bool
) -> None:
    team, job = make_team(2), Job(addresses, rounds=3)
    rng = np.random.default_rng(0)
    interrupts = 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(300):
            if parked:
                wait_until(lambda: len(team._parked) == 1)
            try:
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-5, 1e-4)))
                for _ in range(100_000):
                    team.run(job.steps)
            except KeyboardInterrupt:
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts == 300
    job.run(team)


def test_an_interrupt_before_the_job_begins(
    addresses: dict[str, int], make_team: Callable[[int], Team]
) -> None:
    team, job = make_team(3), Job(addresses)
    for name in ("_lead", "_wake"):
        original = getattr(team, name)

        def interrupt(*_: object, name: str = name, original: object = original) -> None:
            setattr(team, name, original)
            raise KeyboardInterrupt

        setattr(team, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            team.run(job.steps)
        job.run(team)
        wait_until(lambda: len(team._parked) == 2)


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends the process on Windows")
def test_ctrl_c_again_and_again(
    addresses: dict[str, int], make_team: Callable[[int], Team]
) -> None:
    team, job = make_team(2), Job(addresses)
    # A step without an end for about half a second, in which nothing can be cancelled.
    slow = Job(addresses, rounds=1, repeat=400_000)
    slow.reset()
    over = threading.Event()

    def press() -> None:
        time.sleep(0.05)
        while team._aside.locked() and not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        try:
            team.run(slow.steps, interruptible=True)
        finally:
            running = team._aside.locked()
            over.set()
    thread.join()
    assert not running
    job.run(team)


def test_an_interrupt_before_the_thread_aside_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Callable[[], None]] = []

    def interrupt(body: Callable[[], None], args: tuple[()]) -> None:
        late.append(body)
        raise KeyboardInterrupt

    done: list[str] = []
    monkeypatch.setattr(_thread, "start_new_thread", interrupt)
    with pytest.raises(KeyboardInterrupt):
        aside.run_aside(lambda: done.append("work"), lambda: done.append("end"))
    late[0]()  # as if it had only been slow
    assert done == []


def test_persist_raises_when_all_is_done() -> None:
    steps: list[int] = []

    def step() -> None:
        steps.append(1)
        if len(steps) < 4:
            raise KeyboardInterrupt(len(steps))

    with pytest.raises(KeyboardInterrupt, match="1"):
        aside.persist(step, lambda: len(steps) == 5)
    assert len(steps) == 5
    aside.persist(step, lambda: True)
    assert len(steps) == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_no_team(addresses: dict[str, int], make_team: Callable[[int], Team]) -> None:
    team, job = make_team(2), Job(addresses)
    job.run(team)
    child = os.fork()
    if child == 0:
        try:
            team.run(job.steps)
        except HeadraceError as error:
            team.close()
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(9)
    timer = threading.Timer(20, os.kill, (child, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    assert os.waitstatus_to_exitcode(status) == 7
    job.run(team)


def test_nothing_runs_after_close(
    addresses: dict[str, int], make_team: Callable[[int], Team]
) -> None:
    for n_threads in (1, 3):
        team, job = make_team(n_threads), Job(addresses)
        team.close()
        with pytest.raises(HeadraceError, match="closed"):
            team.run(job.steps)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("state", ["new", "parked", "just ran", "cancelled", "interruptible"])
def test_close(
    addresses: dict[str, int], make_team: Callable[[int], Team], state: str, n_threads: int
) -> None:
    before = threading.active_count()
    team, job = make_team(n_threads), Job(addresses, rounds=20)
    assert threading.active_count() == before + n_threads - 1
    if state == "parked":
        wait_until(lambda: len(team._parked) == n_threads - 1)
    elif state == "just ran":
        job.run(team)
    elif state == "cancelled":
        long = Job(addresses, rounds=200_000, repeat=50)
        thread = threading.Thread(target=team.run, args=(long.steps,))
        thread.start()
        while thread.is_alive():
            team.cancel()
            thread.join(0.01)
    elif state == "interruptible":
        job.run(team, interruptible=True)
    begin = time.monotonic()
    team.close()
    team.close()
    assert time.monotonic() - begin < QUICK_S
    assert threading.active_count() == before


def test_many_teams_come_and_go(addresses: dict[str, int]) -> None:
    job = Job(addresses, rounds=10)
    before = threading.active_count()
    for i in range(100):
        team = Team(addresses, i % 6 + 1)
        job.run(team)
        team.close()
    assert threading.active_count() == before


def test_counts_of_threads(addresses: dict[str, int]) -> None:
    for bad in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            Team(addresses, bad)
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
