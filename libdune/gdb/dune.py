# SPDX-License-Identifier: MIT OR Apache-2.0
"""Dune threads for gdb: source libdune/gdb/dune.py, then `help dune`.

A thread in Dune mode is seen in its host loop. Below that frame this shows the guest's own: what the program does in Dune
mode. Its registers lie in the vCPU's run page, where the module writes them on DUNE_SYNC; `dune sync` has the thread make
that call (by read, which every filter that lets a Dune thread live allows). Nothing else of the process is changed.
"""

import gdb
import gdb.unwinder

# Where things are; libdune's own tests compare (libdune/src/layout.rs, host_loop/context.rs, abi.rs).
AREA_BYTES = 0x100000
HOST = 0x40000
HOST_STACK_TOP = 0x80000
CONTEXT_RUN = 0
CONTEXT_BLOCK = 8
CONTEXT_STACK_TOP = 24
CONTEXT_FD = 32
CONTEXT_VCPU = 40
RUN_RIP = 128
RUN_RFLAGS = 136
RUN_ENTRIES = 1144
SYNC_BY_READ = 4

SYS_READ = 0
# The run page's order.
GPRS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()


def word(address):
    return int.from_bytes(gdb.selected_inferior().read_memory(address, 8).tobytes(), "little")


class Vcpu:
    """The vCPU whose host stack RSP points into; None where there is none."""

    @staticmethod
    def at(rsp):
        area = rsp & ~(AREA_BYTES - 1)
        context = area + HOST
        try:
            if word(context + CONTEXT_BLOCK) != area or word(context + CONTEXT_STACK_TOP) != area + HOST_STACK_TOP:
                return None
            return Vcpu(context)
        except gdb.MemoryError:
            return None

    def __init__(self, context):
        self.run = word(context + CONTEXT_RUN)
        self.fd = word(context + CONTEXT_FD)
        self.number = word(context + CONTEXT_VCPU)

    def entries(self):
        return word(self.run + RUN_ENTRIES)

    def registers(self):
        values = {name: word(self.run + 8 * index) for index, name in enumerate(GPRS)}
        values["rip"] = word(self.run + RUN_RIP)
        values["eflags"] = word(self.run + RUN_RFLAGS)
        return values


def register(frame, name):
    return int(frame.read_register(name)) & (2**64 - 1)


# Threads whose run page holds all of the guest, since the process stopped.
synced = set()


def forget(_event):
    if not syncing:
        synced.clear()


syncing = []
gdb.events.cont.connect(forget)


def in_c(expression):
    """The value of an expression of C, whatever language the program is in."""
    language = gdb.parameter("language")
    gdb.execute("set language c", to_string=True)
    try:
        return int(gdb.parse_and_eval(expression))
    finally:
        gdb.execute("set language " + language, to_string=True)


# The host loop: from the instruction that runs the vCPU to the one behind a forwarded call, and what lies around.
loop = range(0)


def find_loop():
    global loop
    try:
        start = in_c("(unsigned long) &dune_run_syscall")
        end = in_c("(unsigned long) &dune_forward_behind")
    except gdb.error:
        raise gdb.GdbError("there are no symbols of libdune: dune_run_syscall is unknown")
    loop = range(start - 64, end + 1024)


class FrameId:
    def __init__(self, sp, pc):
        self.sp = sp
        self.pc = pc


class HostLoop(gdb.unwinder.Unwinder):
    """From a frame of the host loop to the guest's."""

    def __init__(self):
        super().__init__("dune")

    def __call__(self, pending):
        thread = gdb.selected_thread()
        if thread is None or thread.ptid not in synced:
            return None
        pc = register(pending, "rip")
        if pc not in loop:
            return None
        vcpu = Vcpu.at(register(pending, "rsp"))
        if vcpu is None:
            return None
        guest = vcpu.registers()
        # The frame counts as called by the guest's, wherever its stack is.
        info = pending.create_unwind_info(FrameId(gdb.Value(guest["rsp"] - 256), gdb.Value(pc)))
        for name, value in guest.items():
            bits = 32 if name == "eflags" else 64
            kind = pending.architecture().integer_type(bits, False)
            info.add_saved_register(name, gdb.Value((value & (2**bits - 1)).to_bytes(bits // 8, "little"), kind))
        return info


def current():
    thread = gdb.selected_thread()
    if thread is None:
        raise gdb.GdbError("there is no process")
    frame = gdb.newest_frame()
    vcpu = Vcpu.at(register(frame, "rsp"))
    if vcpu is None:
        raise gdb.GdbError("this thread is not in Dune mode")
    return thread, vcpu


def sync():
    thread, vcpu = current()
    if thread.ptid in synced:
        return vcpu
    find_loop()
    syncing.append(thread)
    locking = gdb.parameter("scheduler-locking")
    gdb.execute("set scheduler-locking on", to_string=True)
    try:
        call = "((long (*)(long, long, long, long)) syscall)(%d, %d, %d, %d)" % (SYS_READ, vcpu.fd, vcpu.number, SYNC_BY_READ)
        result = in_c(call)
    except gdb.error as error:
        raise gdb.GdbError("DUNE_SYNC: %s" % error)
    finally:
        gdb.execute("set scheduler-locking %s" % locking, to_string=True)
        syncing.pop()
    if result != 0:
        raise gdb.GdbError("DUNE_SYNC gave %d" % result)
    synced.add(thread.ptid)
    gdb.invalidate_cached_frames()
    return vcpu


class Dune(gdb.Command):
    """Threads in Dune mode (libdune).

    dune bt         backtrace of the selected thread, with the guest's frames
    dune sync       the same without the backtrace: bt, up, frame, info locals show the guest until the process goes on
    dune registers  the guest's registers
    dune threads    which threads are in Dune mode"""

    def __init__(self):
        super().__init__("dune", gdb.COMMAND_STACK, gdb.COMPLETE_NONE, True)


class Sync(gdb.Command):
    """Have the guest's frames of the selected thread shown until the process goes on."""

    def __init__(self):
        super().__init__("dune sync", gdb.COMMAND_STACK)

    def invoke(self, argument, from_tty):
        sync()


class Backtrace(gdb.Command):
    """Backtrace of the selected thread, with the guest's frames. Arguments are those of `backtrace`."""

    def __init__(self):
        super().__init__("dune bt", gdb.COMMAND_STACK)

    def invoke(self, argument, from_tty):
        sync()
        gdb.execute("backtrace " + argument)


class Registers(gdb.Command):
    """The guest's registers of the selected thread."""

    def __init__(self):
        super().__init__("dune registers", gdb.COMMAND_DATA)

    def invoke(self, argument, from_tty):
        for name, value in sync().registers().items():
            print("%-6s %#018x" % (name, value))


class Threads(gdb.Command):
    """Which threads are in Dune mode."""

    def __init__(self):
        super().__init__("dune threads", gdb.COMMAND_STATUS)

    def invoke(self, argument, from_tty):
        selected = gdb.selected_thread()
        for thread in gdb.selected_inferior().threads():
            thread.switch()
            vcpu = Vcpu.at(register(gdb.newest_frame(), "rsp"))
            what = "outside" if vcpu is None else "vCPU %d, %d entries" % (vcpu.number, vcpu.entries())
            print("%3d  %s  %s" % (thread.num, thread.ptid, what))
        if selected is not None:
            selected.switch()


gdb.unwinder.register_unwinder(None, HostLoop(), replace=True)
for command in (Dune, Sync, Backtrace, Registers, Threads):
    command()
