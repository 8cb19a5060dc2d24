/* SPDX-License-Identifier: GPL-2.0 */
/* Everything of the kernel that kmod/sys/ uses; bindgen reads this. */

#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/notifier.h>
#include <asm/ptrace.h>
#include <asm/vmx.h>

#include "helpers.h"
