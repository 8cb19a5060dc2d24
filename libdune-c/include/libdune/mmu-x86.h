/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the first Dune had here is in mmu.h.
 */
#pragma once

#include "mmu.h"
