# cython: language_level=3
"""Has another process make a userfaultfd for its own memory, and hands it to us.

Only a process itself can ask for the record of its writes. So one thread of it is stopped
(ptrace), makes the system call, closes its copy of the descriptor after we have ours
(pidfd_getfd), and continues. It is stopped for less than a millisecond.

    SEIZE, INTERRUPT                  the thread stops where it is, also inside a system call
    save registers and signal mask; block all signals
    SYSCALL: userfaultfd              at a `syscall` instruction that the process has already (vdso)
    pidfd_getfd                       our copy
    SYSCALL: close
    INTERRUPT, CONT                   the next stop is one that a system call is restarted from
    restore registers and signal mask; DETACH

Nothing is written to the process's memory: its threads share their code, and another one might run
what is changed for this one. The last stop is an interrupt, because the kernel restarts a system
call that was interrupted (read, futex, nanosleep) only on the way out of such a stop: it finds the
saved registers there, with the error that asks for the restart.

If the tracer is killed in between, the thread would continue with the registers of the system call.
So this runs in a process of its own: see injector.py.
"""

import os

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <elf.h>
    #include <errno.h>
    #include <fcntl.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/ptrace.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <sys/user.h>
    #include <sys/wait.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef PTRACE_EVENT_STOP
    #define PTRACE_EVENT_STOP 128
    #endif
    #define XM_SYSCALL_STOP (SIGTRAP | 0x80)
    #define XM_GET_DISPATCH 0x4211 /* PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, Linux 6.4 */
    #ifndef __NR_pidfd_send_signal
    #define __NR_pidfd_send_signal 424
    #endif

    #if defined(__x86_64__)
    typedef struct user_regs_struct xm_registers;
    static const unsigned char xm_instruction[] = { 0x0f, 0x05 };
    static void xm_prepare(xm_registers *r, uint64_t at, long nr, long a, long b)
    {
        r->rip = at; r->rax = nr; r->orig_rax = -1; r->rdi = a; r->rsi = b; r->rdx = 0;
    }
    static long xm_result(const xm_registers *r) { return r->rax; }
    static int xm_usable(const xm_registers *r) { return r->cs == 0x33; } /* 64-bit code */
    static void xm_again(xm_registers *r, int restarts, uint64_t first)
    {
        if (restarts && r->rax == (uint64_t)-EINTR) {
            r->rip -= sizeof xm_instruction;
            r->rax = r->orig_rax;
            r->orig_rax = -1;
        }
    }
    static long xm_number(const xm_registers *r) { return r->orig_rax; }
    #elif defined(__aarch64__)
    typedef struct user_regs_struct xm_registers;
    static const unsigned char xm_instruction[] = { 0x01, 0x00, 0x00, 0xd4 };
    static void xm_prepare(xm_registers *r, uint64_t at, long nr, long a, long b)
    {
        r->pc = at; r->regs[8] = nr; r->regs[0] = a; r->regs[1] = b; r->regs[2] = 0;
    }
    static long xm_result(const xm_registers *r) { return r->regs[0]; }
    static int xm_usable(const xm_registers *r) { return !(r->pstate & 0x10); }
    /* Here the kernel has moved the program counter back already where it restarts the call by
       itself. It would begin a sleep anew, which a restart_syscall continues. */
    static void xm_again(xm_registers *r, int restarts, uint64_t first)
    {
        if (restarts && r->regs[0] == (uint64_t)-EINTR) {
            r->pc -= sizeof xm_instruction;
            r->regs[0] = first;
        } else if (r->regs[0] != (uint64_t)-EINTR && (r->regs[8] == __NR_nanosleep
                   || (r->regs[8] == __NR_clock_nanosleep && !(r->regs[1] & 1)))) {
            r->regs[8] = __NR_restart_syscall;
        }
    }
    static long xm_number(const xm_registers *r) { return r->regs[8]; }
    #else
    #define XM_UNKNOWN_PROCESSOR
    typedef struct { long none; } xm_registers;
    static const unsigned char xm_instruction[] = { 0 };
    static void xm_prepare(xm_registers *r, uint64_t at, long nr, long a, long b) { }
    static long xm_result(const xm_registers *r) { return -ENOSYS; }
    static int xm_usable(const xm_registers *r) { return 0; }
    static void xm_again(xm_registers *r, int restarts, uint64_t first) { }
    static long xm_number(const xm_registers *r) { return -1; }
    #endif

    /* Whether a call that says EINTR has done nothing yet, and may be made once more. The kernel
       says it for these after any stop, and a program need not expect it. connect(2) and close(2)
       are not among them. */
    static int xm_restarts(long number)
    {
        static const long safe[] = {
    #ifdef __NR_epoll_wait
            __NR_epoll_wait, __NR_semop,
    #endif
            __NR_epoll_pwait, __NR_rt_sigtimedwait, __NR_semtimedop, __NR_msgsnd, __NR_msgrcv,
            __NR_io_getevents, 441 /* epoll_pwait2 */, 426 /* io_uring_enter */,
            __NR_read, __NR_readv, __NR_write, __NR_writev, __NR_recvfrom, __NR_recvmsg,
            __NR_sendto, __NR_sendmsg, __NR_accept, __NR_accept4,
        };
        for (unsigned i = 0; i < sizeof safe / sizeof *safe; i++)
            if (safe[i] == number)
                return 1;
        return 0;
    }

    static double xm_now(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec + now.tv_nsec / 1e9;
    }

    /* Waits until the thread has stopped; 0, or -errno. ESRCH: it has ended. */
    static int xm_wait(pid_t thread, int *status, double until)
    {
        struct timespec pause = { 0, 20000 };
        for (;;) {
            pid_t done = waitpid(thread, status, __WALL | WNOHANG);
            if (done == thread)
                return WIFSTOPPED(*status) ? 0 : -ESRCH;
            if (done < 0 && errno != EINTR)
                return -errno;
            if (xm_now() > until)
                return -ETIMEDOUT;
            nanosleep(&pause, 0);
        }
    }

    /* Continues a thread until its next stop of the wanted kind. Signals are blocked, so others are
       stops of the whole process (SIGSTOP), which ptrace reports and which stay in force. */
    static int xm_continue(pid_t thread, int how, int event, double until)
    {
        int status, failed;
        for (;;) {
            if (ptrace(how, thread, 0, 0))
                return -errno;
            if ((failed = xm_wait(thread, &status, until)))
                return failed;
            if (event ? status >> 16 == event : WSTOPSIG(status) == XM_SYSCALL_STOP)
                return 0;
            if (status >> 16 != PTRACE_EVENT_STOP)
                return -EINTR;
        }
    }

    static int xm_registers_of(pid_t thread, xm_registers *r)
    {
        struct iovec all = { r, sizeof *r };
        return ptrace(PTRACE_GETREGSET, thread, NT_PRSTATUS, &all) ? -errno : 0;
    }

    static int xm_set_registers(pid_t thread, const xm_registers *r)
    {
        struct iovec all = { (void *)r, sizeof *r };
        return ptrace(PTRACE_SETREGSET, thread, NT_PRSTATUS, &all) ? -errno : 0;
    }

    /* Has the stopped thread make a system call; its result, or -errno of ours in `failed`. */
    static long xm_call(pid_t thread, const xm_registers *saved, uint64_t at, double until,
                        int *failed, long nr, long a, long b)
    {
        xm_registers r = *saved;
        xm_prepare(&r, at, nr, a, b);
        if ((*failed = xm_set_registers(thread, &r))
            || (*failed = xm_continue(thread, PTRACE_SYSCALL, 0, until))
            || (*failed = xm_continue(thread, PTRACE_SYSCALL, 0, until))
            || (*failed = xm_registers_of(thread, &r)))
            return -1;
        return xm_result(&r);
    }

    /* Whether the stopped thread may be used: 0, or -errno. What was seen before it was stopped may
       have changed: its number may be another process's now, and not by chance.

       ESRCH    it is no thread of the process
       ENOTSUP  its system calls are filtered, or handled by the program itself
       ESTALE   it acts for other users, or has no system call instruction at that address */
    static int xm_unfit(pid_t pid, pid_t thread, int pidfd, const char *users, uint64_t at)
    {
        char path[64], line[256];
        int fresh = 1, same = 0, filtered = 1, i;
        struct { uint64_t mode, selector, offset, length; } dispatch = { 0, 0, 0, 0 };
        FILE *file;
        long word;
        snprintf(path, sizeof path, "/proc/%d/task/%d/status", (int)pid, (int)thread);
        if (!(file = fopen(path, "re")))
            return -ESRCH;
        while (fgets(line, sizeof line, file)) {
            size_t length = strlen(line);
            if (fresh && !strncmp(line, "Uid:", 4))
                same = !strncmp(line + 5, users, strlen(users)) && line[5 + strlen(users)] == '\\n';
            if (fresh && !strncmp(line, "Seccomp:", 8))
                filtered = atoi(line + 8) != 0;
            fresh = length && line[length - 1] == '\\n';   /* else the line goes on */
        }
        fclose(file);
        if (syscall(__NR_pidfd_send_signal, pidfd, 0, 0, 0))
            return -ESRCH;   /* the process has ended, so the number is not its own any more */
        if (!same)
            return -ESTALE;
        if (!ptrace(XM_GET_DISPATCH, thread, sizeof dispatch, &dispatch) && dispatch.mode)
            return -ENOTSUP;
        if (filtered)
            return -ENOTSUP;
        errno = 0;
        word = ptrace(PTRACE_PEEKTEXT, thread, at, 0);
        if (errno)
            return -ESTALE;
        for (i = 0; i < (int)sizeof xm_instruction; i++)
            if (((unsigned char *)&word)[i] != xm_instruction[i])
                return -ESTALE;
        return 0;
    }

    struct xm_injection { int failed; long result; double seconds; };

    /* The descriptor, as a copy of ours; or `failed`: -errno of a step, `result`: of the call. */
    static int xm_inject(pid_t pid, pid_t thread, int pidfd, const char *users, uint64_t at,
                         uint64_t first, double patience, struct xm_injection *done)
    {
        xm_registers saved;
        uint64_t bits = 0, every = ~0ull;
        int status, own = -1, undone;
        double until = xm_now() + patience, began;
        done->failed = 0; done->result = 0; done->seconds = 0;
        if (ptrace(PTRACE_SEIZE, thread, 0, PTRACE_O_TRACESYSGOOD)) {
            done->failed = -errno;
            return -1;
        }
        began = xm_now();
        if (ptrace(PTRACE_INTERRUPT, thread, 0, 0))
            done->failed = -errno;
        else
            for (;;) {   /* signals that come first are delivered, as they would be */
                if ((done->failed = xm_wait(thread, &status, until)) || status >> 16)
                    break;
                if (ptrace(PTRACE_CONT, thread, 0, WSTOPSIG(status))) {
                    done->failed = -errno;
                    break;
                }
            }
        if (done->failed)
            return -1;   /* the end of this process detaches: nothing was changed */
        if ((done->failed = xm_registers_of(thread, &saved)) == 0 && !xm_usable(&saved))
            done->failed = -ENOEXEC;
        if (!done->failed)
            done->failed = xm_unfit(pid, thread, pidfd, users, at);
        if (!done->failed && ptrace(PTRACE_GETSIGMASK, thread, sizeof bits, &bits))
            done->failed = -errno;
        if (!done->failed && ptrace(PTRACE_SETSIGMASK, thread, sizeof every, &every))
            done->failed = -errno;
        if (done->failed) {
            ptrace(PTRACE_DETACH, thread, 0, 0);
            return -1;
        }
        done->result = xm_call(thread, &saved, at, until, &done->failed,
                               __NR_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1, 0);
        if (!done->failed && done->result >= 0) {
            own = syscall(__NR_pidfd_getfd, pidfd, (int)done->result, 0);
            if (own < 0)
                done->failed = -errno;
            undone = 0;
            xm_call(thread, &saved, at, until, &undone, __NR_close, done->result, 0);
            if (!done->failed)
                done->failed = undone;
        }
        /* The restart of what was interrupted: see above. */
        xm_again(&saved, xm_restarts(xm_number(&saved)), first);
        if (ptrace(PTRACE_INTERRUPT, thread, 0, 0) == 0)
            xm_continue(thread, PTRACE_CONT, PTRACE_EVENT_STOP, xm_now() + patience);
        xm_set_registers(thread, &saved);
        ptrace(PTRACE_SETSIGMASK, thread, sizeof bits, &bits);
        ptrace(PTRACE_DETACH, thread, 0, 0);
        done->seconds = xm_now() - began;
        return own;
    }
    """
    cdef struct xm_injection:
        int failed
        long result
        double seconds
    const unsigned char[] xm_instruction
    int xm_inject(
        int, int, int, const char*, uint64_t, uint64_t, double, xm_injection*
    ) nogil

INSTRUCTION = bytes(xm_instruction[:sizeof(xm_instruction)])
"""The instruction that makes a system call; a zero byte on a processor that is not supported."""


def inject(
    int pid, int thread, int pidfd, bytes users, uint64_t at, uint64_t first, double patience
):
    """Have a thread of another process make a userfaultfd. Return (descriptor, seconds stopped).

    pid, pidfd -- the process, and an open pidfd of it
    thread     -- its number; it is stopped for as long as two system calls take
    users      -- the value of Uid in /proc/PID/status: who it must act for still
    at         -- the address of an INSTRUCTION in that process
    first      -- the first argument of the system call that it is in, where that is known; the
                  registers of aarch64 do not show it any more when the call says EINTR
    patience   -- seconds for each part

    Call it in a process that does nothing else. Raises OSError: of ptrace (EPERM, ESRCH), ETIMEDOUT
    if the thread does not stop, ENOEXEC for a 32-bit program, ENOTSUP if system calls are
    filtered, ESTALE if it is not what it was, or what the call gave.
    """
    cdef xm_injection done
    cdef int fd, reason
    cdef const char* who = users
    with nogil:
        fd = xm_inject(pid, thread, pidfd, who, at, first, patience, &done)
    if fd >= 0 and not done.failed:
        return fd, done.seconds
    if fd >= 0:
        os.close(fd)
    reason = -done.failed if done.failed else -<int>done.result
    raise OSError(reason, os.strerror(reason))
