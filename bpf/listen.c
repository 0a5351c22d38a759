// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* sockops of the proxy alone: the listener for what comes in is known to sk_lookup.c from its listen(2) on, whoever runs then. */

int narrows_listen(struct bpf_sock_ops *ctx)
{
	u64 netns;

	if (ctx->op == BPF_SOCK_OPS_TCP_LISTEN_CB && ctx->local_port == NARROWS_INBOUND_PORT) {
		netns = bpf_get_netns_cookie(ctx);
		listeners.sock_hash_update(ctx, &netns, BPF_ANY);
	}
	return 1;
}
