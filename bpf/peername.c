// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* cgroup/getpeername4 and 6 of a captured pod: the application sees the address that it connected to. */

int narrows_getpeername4(struct bpf_sock_addr *ctx)
{
	struct narrows_end *to = originals.sk_storage_get(ctx->sk, 0, 0);

	if (to) {
		ctx->user_ip4 = to->ip[3];
		ctx->user_port = bpf_htons((u16)to->port);
	}
	return 1;
}

int narrows_getpeername6(struct bpf_sock_addr *ctx)
{
	struct narrows_end *to = originals.sk_storage_get(ctx->sk, 0, 0);

	if (to) {
		ctx->user_ip6[0] = to->ip[0];
		ctx->user_ip6[1] = to->ip[1];
		ctx->user_ip6[2] = to->ip[2];
		ctx->user_ip6[3] = to->ip[3];
		ctx->user_port = bpf_htons((u16)to->port);
	}
	return 1;
}
