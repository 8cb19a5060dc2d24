/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The types of ELF are the system's; the functions are in dune.h.
 */
#pragma once

#include <elf.h>
