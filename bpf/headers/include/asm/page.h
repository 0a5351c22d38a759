/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* Named by BCC's helpers.h; nothing of it is used. */
#pragma once
