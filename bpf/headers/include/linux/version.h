/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* 6.10, the newest that this tree stands for; BCC_LINUX_VERSION_CODE says the same number (395776). */
#pragma once
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 10, 0)
