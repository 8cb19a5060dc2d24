/* SPDX-License-Identifier: GPL-2.0 */
/* Names that Linux gave to what older kernels have under others. */
#ifndef DUNE_COMPAT_H
#define DUNE_COMPAT_H

#include <asm/msr.h>

/* Since 6.16. */
#ifndef rdmsrq
#define rdmsrq rdmsrl
#define rdmsrq_safe rdmsrl_safe
#define native_wrmsrq native_wrmsrl
#endif

#endif
