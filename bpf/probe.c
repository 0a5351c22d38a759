// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* Trivial connect hook: lets everything pass and counts. It shows that BCC can compile, create a map and load here. */

#define PROBE_ALLOW 1

BPF_ARRAY(probe_connects, u64, 1);

int narrows_probe(struct bpf_sock_addr *ctx)
{
	int key = 0;
	u64 *count = probe_connects.lookup(&key);

	if (count)
		__sync_fetch_and_add(count, 1);
	return PROBE_ALLOW;
}
