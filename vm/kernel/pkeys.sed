# arch/x86/kernel/fpu/xstate.c
# SPDX-License-Identifier: GPL-2.0
#
# Bochs 2.7 saves and restores PKRU with XSAVE, in 64 bytes behind AVX-512's, but its CPUID leaf 0DH tells neither its place nor
# its size. Linux warns then, and uses neither XSAVE nor protection keys.
/^\t\txstate_sizes\[i\] = eax;$/i\
\t\tif (i == XFEATURE_PKRU \&\& !eax) {\
\t\t\teax = 64;\
\t\t\tebx = 2688;\
\t\t}
s/return XCHECK_SZ(sz, nr, struct pkru_state);/return true;/
