/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* Named by BCC's helpers.h, whose macro for ring buffers multiplies with it; ours divide by it before, so any value does. */
#pragma once
#define PAGE_SIZE 4096
