/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Types and macros of libdune/dune.h. Include that.
 */
#pragma once

#include <elf.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>

#include "mmu.h"

typedef void (*sighandler_t)(int);

/* Selectors, in Linux' order. CPL3's carry the privilege level: GD_UD | 3, GD_UT | 3. */
#define GD_KT 0x10
#define GD_KD 0x18
#define GD_UD 0x28
#define GD_UT 0x30
#define GD_TSS 0x38
#define GD_TSS2 0x40
#define NR_GDT_ENTRIES 9

/* Arguments of a system call in a struct dune_tf. */
#define ARG0(tf) ((tf)->rdi)
#define ARG1(tf) ((tf)->rsi)
#define ARG2(tf) ((tf)->rdx)
#define ARG3(tf) ((tf)->rcx)
#define ARG4(tf) ((tf)->r8)
#define ARG5(tf) ((tf)->r9)

/* Permissions of the dune_vm_* functions. */
#define PERM_NONE 0
#define PERM_R 0x0001
#define PERM_W 0x0002
#define PERM_X 0x0004
#define PERM_U 0x0008        /* CPL3 too */
#define PERM_UC 0x0010       /* sets PTE_PCD, which has no effect under EPT */
#define PERM_COW 0x0020      /* PTE_COW instead of PTE_W */
#define PERM_BIG 0x0100      /* pages of 2 MiB where addresses allow it */
#define PERM_BIG_1GB 0x0200  /* pages of 1 GiB where addresses allow it */
#define PERM_USR1 0x1000     /* the program's: PTE_USR1 */
#define PERM_USR2 0x2000     /* the program's: PTE_USR2 */
#define PERM_USR3 0x3000     /* both */

#define PERM_SCODE (PERM_R | PERM_X)
#define PERM_STEXT (PERM_R | PERM_W)
#define PERM_SSTACK PERM_STEXT
#define PERM_UCODE (PERM_R | PERM_U | PERM_X)
#define PERM_UTEXT (PERM_R | PERM_U | PERM_W)
#define PERM_USTACK PERM_UTEXT

/* What dune_vm_lookup makes where nothing is mapped yet. */
enum {
	CREATE_NONE = 0,
	CREATE_NORMAL = 1,
	CREATE_BIG = 2,
	CREATE_BIG_1GB = 3,
};

/* First and last address of all. */
#define VA_START ((void *)0)
#define VA_END ((void *)-1)

/* load_cr3: keep what the TLB has of the table. */
#define CR3_NOFLUSH (1UL << 63)

#define PROCMAP_TYPE_UNKNOWN 0x00
#define PROCMAP_TYPE_FILE 0x01
#define PROCMAP_TYPE_ANONYMOUS 0x02
#define PROCMAP_TYPE_HEAP 0x03
#define PROCMAP_TYPE_STACK 0x04
#define PROCMAP_TYPE_VSYSCALL 0x05
#define PROCMAP_TYPE_VDSO 0x06
#define PROCMAP_TYPE_VVAR 0x07

/* dune_config.ret */
#define DUNE_RET_EPT_VIOLATION 2
#define DUNE_RET_INTERRUPT 3
#define DUNE_RET_UNHANDLED_VMEXIT 5
#define DUNE_RET_NOENTER 6

/* A page of the pool. The link is its owner's as long as it has users. */
SLIST_HEAD(page_head, page);
typedef SLIST_ENTRY(page) page_entry_t;

struct page {
	page_entry_t link;
	uint64_t ref;
};
