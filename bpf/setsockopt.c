// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* cgroup/setsockopt of a captured pod: our mark is refused (EPERM), since capture by iptables lets pass what carries it. Every other
 * option goes to the kernel as it is: optlen 0 says so, also for those that are longer than a program can see (a page). */

int narrows_setsockopt(struct bpf_sockopt *ctx)
{
	u32 *mark = ctx->optval;
	int refused = ctx->level == LEVEL_SOCKET && ctx->optname == OPTION_MARK && (void *)(mark + 1) <= ctx->optval_end &&
		(*mark & NARROWS_MARK_MASK) == NARROWS_MARK;

	if (refused)
		return 0;
	ctx->optlen = 0;
	return 1;
}
