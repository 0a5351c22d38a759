/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
#pragma once
#include <uapi/linux/bpf_common.h>
