/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* Empty on purpose: BCC brings its own copy of this header as a virtual file, and two would clash. */
