# mm/kasan/kasan.h
# SPDX-License-Identifier: GPL-2.0
#
# KASAN unwinds the stack at every allocation and at every free. Twelve frames name who did it; the 64 that Linux asks for
# cost the emulator a quarter of its time.
s/#define KASAN_STACK_DEPTH 64/#define KASAN_STACK_DEPTH 12/
