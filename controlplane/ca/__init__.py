"""The mesh's certificate authority: who may have which certificate, the key that signs it, and the record of every one."""
