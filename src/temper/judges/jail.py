"""The inside of the sandbox: a bare Python runs this file, which shuts itself in and then runs what a model wrote. Floor 4.

It imports nothing of Temper's and is started by path (`python -S -s -P jail.py`), so that neither Temper nor any installed package can be
reached from inside. What each wall keeps in is said in docs/methods/rewards.md. Where the kernel gives no walls (no seccomp or Landlock:
other systems, old kernels) there is an audit hook, which stops what tries the front door only.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

LINK = 0  # standard input is a socket to the caller: the job comes in, "ready" and the verdict go out

# The system calls that stay open, and their numbers (x86_64, aarch64): one process with threads, its memory, clocks and files that are
# opened under Landlock's rules. Not among them: socket, fork, execve, ptrace, setsid, chmod, truncate by name, prctl, io_uring, ...
CALLS = """
read 0 63, write 1 64, open 2, close 3 57, stat 4, fstat 5 80, lstat 6, poll 7, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215,
brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, ioctl 16 29, pread64 17 67, pwrite64 18 68, readv 19 65,
writev 20 66, access 21, pipe 22, select 23, sched_yield 24 124, mremap 25 216, mincore 27 232, madvise 28 233, dup 32 23, dup2 33,
pause 34, nanosleep 35 101, getitimer 36 102, alarm 37, setitimer 38 103, getpid 39 172, sendfile 40 71, sendto 44 206, recvfrom 45 207,
sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockname 51 204, getpeername 52 205, socketpair 53 199, setsockopt 54 208,
getsockopt 55 209, exit 60 93, uname 63 160, fcntl 72 25, flock 73 32, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getdents 78,
getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82, mkdir 83, rmdir 84, unlink 87, readlink 89, umask 95 166, gettimeofday 96 169,
getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177,
getppid 110 173, getpgrp 111, getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgid 121 155, getsid 124 156,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43, fstatfs 138 44,
getpriority 140 141, sched_getparam 143 121, sched_getscheduler 145 120, arch_prctl 158, gettid 186 178, time 201, futex 202 98,
sched_getaffinity 204 123, epoll_create 213, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223,
timer_create 222 107, timer_settime 223 110, timer_gettime 224 108, timer_getoverrun 225 109, timer_delete 226 111, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232, epoll_ctl 233 21, openat 257 56, mkdirat 258 34,
newfstatat 262 79, unlinkat 263 35, renameat 264 38, readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73,
set_robust_list 273 99, get_robust_list 274 100, epoll_pwait 281 22, timerfd_create 283 85, eventfd 284, timerfd_settime 286 86,
timerfd_gettime 287 87, eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70, renameat2 316 276,
getrandom 318 278, membarrier 324 283, copy_file_range 326 285, preadv2 327 286, pwritev2 328 287, statx 332 291, rseq 334 293,
close_range 436 436, faccessat2 439 439, epoll_pwait2 441 441, futex_waitv 449 449
"""
OWN = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}  # on itself alone: the first argument is 0 or its own process
CLONE, CLONE3 = (56, 220), 435  # threads, not processes; clone3 "does not exist", so that the C library takes clone
CLONE_THREAD = 0x00010000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of CALLS, AUDIT_ARCH

READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime")
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38


class Unwalled(Exception):
    """The kernel does not give a wall."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    """A system call by its number. Raises Unwalled."""
    found = libc.syscall(ctypes.c_long(number), *arguments)
    if found < 0:
        raise Unwalled(os.strerror(ctypes.get_errno()))
    return found


def limits(seconds: int, memory: int, files: int) -> None:
    """CPU seconds, address space and size of a file in bytes; few open files; no core dumps."""
    wanted = {"CPU": seconds, "AS": memory, "FSIZE": files, "NOFILE": 64, "CORE": 0, "STACK": 8 << 20, "NPROC": 64}
    for name, value in wanted.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(which, (value, value + 1 if name == "CPU" and value != hard else value))  # first SIGXCPU, then SIGKILL


def powerless(libc: ctypes.CDLL) -> None:
    """No way to more rights, and for root none of root's; it ends with its caller."""
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise Unwalled("no_new_privs")
    header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    _call(libc, 126 if platform.machine() == "x86_64" else 91, header, none)  # capset


def landlock(libc: ctypes.CDLL, home: str) -> None:
    """Files: the standard library and the system's libraries can be read, `home` can be written, nothing else be opened."""
    abi = _call(libc, 444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    handled = (1 << 13) - 1  # all rights on files of the first version
    handled |= (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0) | (1 << 15 if abi >= 5 else 0)
    read = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
    make = handled & ~(1 << 0 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 15)  # no running, devices, sockets, pipes, links
    attr = struct.pack("<QQQ", handled, 0, 0)
    rules = _call(libc, 444, attr, ctypes.c_size_t(8 if abi < 4 else 16 if abi < 6 else 24), ctypes.c_uint32(0))
    places = dict.fromkeys([*READABLE, *sys.path, f"{sys.base_prefix}/lib"], read)
    for place, rights in {**places, "/dev/null": 1 << 1 | 1 << 2 | 1 << 14, "/dev/urandom": 1 << 2, home: make}.items():
        if place and os.path.exists(place):
            fd = os.open(place, os.O_PATH | os.O_CLOEXEC)
            rights = rights if os.path.isdir(place) else rights & handled & (1 << 1 | 1 << 2 | 1 << 14)
            _call(libc, 445, ctypes.c_int(rules), ctypes.c_int(1), struct.pack("<Qi", rights, fd), ctypes.c_uint32(0))
            os.close(fd)
    _call(libc, 446, ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def program(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """The filter as instructions of classic BPF (code, jump if true, jump if false, value)."""
    column, arch = MACHINES[machine]
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    numbers = [int(words[1 + column]) for call in CALLS.split(",") if len(words := call.split()) > 1 + column]
    out = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, KILL), (load, 0, 0, 0)]
    for number in numbers:  # on x86_64 the calls of the x32 interface have numbers of their own, which are not among these
        out += [(equal, 0, 1, number), (give, 0, 0, ALLOW)]
    out += [(equal, 0, 1, CLONE3), (give, 0, 0, ERRNO | ENOSYS)]
    out += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (bits, 0, 1, CLONE_THREAD), (give, 0, 0, ALLOW), (give, 0, 0, ERRNO | EPERM)]
    for both in OWN.values():
        out += [(equal, 0, 5, both[column]), (load, 0, 0, 16), (equal, 1, 0, pid), (equal, 0, 1, 0), (give, 0, 0, ALLOW)]
        out += [(give, 0, 0, ERRNO | EPERM)]
    return [*out, (give, 0, 0, ERRNO | EPERM)]


def seccomp(libc: ctypes.CDLL) -> None:
    """System calls: those of CALLS and no others. No sockets, no further processes."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise Unwalled(f"no table of system calls for {machine}")
    lines = program(machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
    fprog = struct.pack("<HxxxxxxQ", len(lines), ctypes.addressof(code))
    if libc.prctl(22, 2, fprog, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise Unwalled(os.strerror(ctypes.get_errno()))


SHUT = (
    *("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "pty.", "ctypes.", "os.chmod"),
    *("os.chown", "os.link", "os.symlink", "os.truncate", "shutil.", "os.remove", "os.rename", "os.rmdir", "signal.pthread_kill"),
)


def hook(home: str) -> None:
    """Python's own events: sockets, processes, files outside `home` that are not the standard library's. Not a wall: C code has none."""
    inside = [os.path.realpath(place) + os.sep for place in (home, *sys.path, f"{sys.base_prefix}/lib")]

    def look(event: str, arguments: tuple) -> None:
        if event.startswith(SHUT):
            raise PermissionError(f"{event} is shut in here")
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not path.startswith(tuple(inside[:1] if writes else inside)) and path != os.devnull:
                raise PermissionError(f"{path} is outside")

    sys.addaudithook(look)


def shut_in(home: str, weak: bool) -> list[str]:
    """The walls that stand. Raises Unwalled where the kernel's are missing and `weak` does not allow the hook in their place."""
    stand, missing = [], []
    if sys.platform == "linux":
        libc = _libc()
        for name, build in ("rights", lambda: powerless(libc)), ("files", lambda: landlock(libc, home)), ("calls", lambda: seccomp(libc)):
            try:
                build()
                stand.append(name)
            except Unwalled as error:
                missing.append(f"{name}: {error}")
    else:
        missing.append(f"{sys.platform} has none that are known here")
    if missing and not weak:
        raise Unwalled("; ".join(missing))
    if missing:
        hook(home)
        stand.append("hook")
    return stand


def main() -> None:
    read, write = os.read, os.write
    link = os.dup(LINK)
    os.dup2(os.open(os.devnull, os.O_RDONLY), LINK)

    def take(n: int) -> bytes:
        out = b""
        while len(out) < n and (more := read(link, n - len(out))):
            out += more
        return out

    job = json.loads(take(int.from_bytes(take(4), "little")))
    home = os.getcwd()
    if job["tests"] is None:  # a program that reads and writes
        given = os.open("input", os.O_RDWR | os.O_CREAT, 0o600)
        data = job["given"].encode("utf-8", "surrogatepass")
        while data:
            data = data[write(given, data) :]
        os.lseek(given, 0, os.SEEK_SET)
        os.dup2(given, LINK)
        os.unlink("input")
    limits(job["seconds"], job["memory"], job["files"])
    try:
        walls = shut_in(home, job["weak"])
    except Unwalled as error:
        write(link, json.dumps({"unwalled": str(error)}).encode() + b"\n")
        os._exit(3)
    write(link, json.dumps({"walls": walls}).encode() + b"\n")
    try:
        space = {"__name__": "__main__" if job["tests"] is None else "solution"}
        try:
            exec(compile(job["code"], "answer.py", "exec"), space)
        except SystemExit as error:
            if job["tests"] is not None or error.code:
                raise
        if job["tests"] is not None:
            exec(compile(job["tests"], "tests.py", "exec"), space)
        sys.stdout.flush()
    except BaseException as error:
        with contextlib.suppress(BaseException):
            write(link, json.dumps({"failed": f"{type(error).__name__}: {str(error)[:200]}"}).encode() + b"\n")
        os._exit(1)
    write(link, json.dumps({"passed": take(32).decode()}).encode() + b"\n")  # what it could not know before the tests were through
    os._exit(0)


if __name__ == "__main__":
    main()
