/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages and entries of page tables.
 */
#pragma once

#include <stdint.h>

typedef unsigned long ptent_t;
typedef unsigned long physaddr_t;

#define PGSHIFT 12
#define PGSIZE 4096
#define PGMASK (PGSIZE - 1)
#define PGOFF(la) ((uintptr_t)(la) & PGMASK)
#define PGADDR(la) ((uintptr_t)(la) & ~(uintptr_t)PGMASK)
#define PPN(la) ((la) >> PGSHIFT)

#define BIG_PGSHIFT 21
#define BIG_PGSIZE (1 << BIG_PGSHIFT)
#define BIG_PGMASK (BIG_PGSIZE - 1)
#define BIG_PGOFF(la) ((uintptr_t)(la) & BIG_PGMASK)
#define BIG_PGADDR(la) ((uintptr_t)(la) & ~(uintptr_t)BIG_PGMASK)

/* Index of an address into a table: 0 of 4 KiB entries to 3, the top table. */
#define NPTBITS 9
#define NPTENTRIES (1 << NPTBITS)
#define NPTLVLS 3
#define PDXMASK (NPTENTRIES - 1)
#define PDSHIFT(n) (PGSHIFT + NPTBITS * (n))
#define PDX(n, la) (((uintptr_t)(la) >> PDSHIFT(n)) & PDXMASK)

#define PTE_P 0x0001UL    /* present */
#define PTE_W 0x0002UL    /* writable */
#define PTE_U 0x0004UL    /* CPL3 too */
#define PTE_PWT 0x0008UL  /* no effect under EPT */
#define PTE_PCD 0x0010UL  /* no effect under EPT */
#define PTE_A 0x0020UL    /* the CPU used the page */
#define PTE_D 0x0040UL    /* the CPU wrote to the page */
#define PTE_PS 0x0080UL   /* a large page */
#define PTE_G 0x0100UL    /* stays in the TLB, where CR4.PGE is set */
#define PTE_COW 0x0200UL  /* a write gets a copy: dune_vm_default_pgflt_handler */
#define PTE_USR1 (1UL << 55)
#define PTE_USR2 (1UL << 56)
#define PTE_NX (1UL << 63)

#define PTE_ADDR(pte) ((physaddr_t)(pte) & 0x000ffffffffff000UL)
#define PTE_FLAGS(pte) ((physaddr_t)(pte) & 0xfff0000000000fffUL)

/* Error codes of page faults. */
#define FEC_P 0x1       /* the page is there, but not for this access */
#define FEC_W 0x2       /* a write */
#define FEC_U 0x4       /* by CPL3 */
#define FEC_RSV 0x8     /* a reserved bit is set in an entry */
#define FEC_I 0x10      /* an instruction fetch */
