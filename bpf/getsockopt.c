// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* cgroup/getsockopt of the proxy: answers SO_ORIGINAL_DST (IP6T_SO_ORIGINAL_DST has the same number) as conntrack does, in the form of
 * the level that asks. Every other answer is the kernel's: optlen 0 tells it to leave its own in place. */

struct narrows_sockaddr {	/* sockaddr_in, and sockaddr_in6 */
	u16 family;
	u16 port;
	u32 ip4;
	u32 ip6[4];
	u32 scope;
};

int narrows_getsockopt(struct bpf_sockopt *ctx)
{
	struct narrows_sockaddr *six = ctx->optval;
	struct narrows_end *to = 0;
	u32 *words = ctx->optval;

	if (ctx->optname == OPTION_ORIGINAL_DST && (ctx->level == LEVEL_IP || ctx->level == LEVEL_IPV6) && ctx->sk)
		to = originals.sk_storage_get(ctx->sk, 0, 0);
	if (!to) {
		ctx->optlen = 0;
		return 1;
	}
	if (ctx->level == LEVEL_IP) {
		if ((void *)(words + 4) > ctx->optval_end)
			return 1;
		six->family = FAMILY_INET4;
		six->port = bpf_htons((u16)to->port);
		six->ip4 = to->ip[3];
		words[2] = 0;
		words[3] = 0;
		ctx->optlen = 16;
	} else {
		if ((void *)(six + 1) > ctx->optval_end)
			return 1;
		six->family = FAMILY_INET6;
		six->port = bpf_htons((u16)to->port);
		six->ip4 = 0;
		six->ip6[0] = to->ip[0];
		six->ip6[1] = to->ip[1];
		six->ip6[2] = to->ip[2];
		six->ip6[3] = to->ip[3];
		six->scope = 0;
		ctx->optlen = 28;
	}
	ctx->retval = 0;
	return 1;
}
