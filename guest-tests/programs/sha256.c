/* SHA-256, FIPS 180-4: constants of section 4.2.2, functions of 4.1.2, padding of 5.1.1, rounds of 6.2.2. */
#include "sha256.h"

#include "guest.h"

#include <stdio.h>
#include <string.h>

const uint32_t sha256_k[64] __attribute__((aligned(16))) = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t rotate(uint32_t x, int n)
{
	return x >> n | x << (32 - n);
}

static void compress_plain(uint32_t state[8], const uint8_t *block)
{
	uint32_t w[64], s[8];

	for (int t = 0; t < 16; t++) {
		uint32_t word;

		memcpy(&word, block + 4 * t, sizeof(word));
		w[t] = __builtin_bswap32(word); /* big-endian words; guests are little-endian */
	}
	for (int t = 16; t < 64; t++) {
		uint32_t sigma0 = rotate(w[t - 15], 7) ^ rotate(w[t - 15], 18) ^ w[t - 15] >> 3;
		uint32_t sigma1 = rotate(w[t - 2], 17) ^ rotate(w[t - 2], 19) ^ w[t - 2] >> 10;

		w[t] = sigma1 + w[t - 7] + sigma0 + w[t - 16];
	}
	memcpy(s, state, sizeof(s));
#pragma GCC unroll 8
	for (int t = 0; t < 64; t++) {
		/* Unrolled by 8, the working variables rotate by name instead of by being moved. */
		uint32_t *a = &s[-t & 7], *b = &s[(1 - t) & 7], *c = &s[(2 - t) & 7], *d = &s[(3 - t) & 7];
		uint32_t *e = &s[(4 - t) & 7], *f = &s[(5 - t) & 7], *g = &s[(6 - t) & 7], *h = &s[(7 - t) & 7];
		uint32_t sum1 = rotate(*e, 6) ^ rotate(*e, 11) ^ rotate(*e, 25);
		uint32_t t1 = *h + sum1 + ((*e & *f) ^ (~*e & *g)) + sha256_k[t] + w[t];
		uint32_t sum0 = rotate(*a, 2) ^ rotate(*a, 13) ^ rotate(*a, 22);

		*d += t1;
		*h = t1 + sum0 + ((*a & *b) ^ (*a & *c) ^ (*b & *c));
	}
	for (int i = 0; i < 8; i++)
		state[i] += s[i];
}

static sha256_compress *compress = compress_plain;

void sha256_choose(int plain)
{
	sha256_compress *faster = plain ? NULL : sha256_by_instruction();

	compress = faster ? faster : compress_plain;
}

void sha256_init(struct sha256 *hash)
{
	static const uint32_t initial[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
					     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };

	memcpy(hash->state, initial, sizeof(initial));
	hash->length = 0;
}

void sha256_update(struct sha256 *hash, const void *data, size_t length)
{
	const uint8_t *byte = data;
	size_t held = hash->length % 64;

	hash->length += length;
	if (held) {
		size_t part = length < 64 - held ? length : 64 - held;

		memcpy(hash->block + held, byte, part);
		byte += part;
		length -= part;
		if (held + part < 64)
			return;
		compress(hash->state, hash->block);
	}
	for (; length >= 64; byte += 64, length -= 64)
		compress(hash->state, byte);
	memcpy(hash->block, byte, length);
}

void sha256_hex(struct sha256 *hash, char hex[65])
{
	static const uint8_t padding[64] = { 0x80 };
	uint64_t bits = __builtin_bswap64(hash->length * 8);

	sha256_update(hash, padding, 1 + (119 - hash->length % 64) % 64);
	sha256_update(hash, &bits, sizeof(bits));
	for (int i = 0; i < 8; i++)
		snprintf(hex + 8 * i, 9, "%08x", hash->state[i]);
}

static int hash_file(const char *path)
{
	static uint8_t buffer[1 << 16];
	struct sha256 hash;
	char hex[65];
	size_t got;
	FILE *file = fopen(path, "rb");

	if (!file)
		give_up("open %s", path);
	sha256_init(&hash);
	while ((got = fread(buffer, 1, sizeof(buffer), file)) > 0)
		sha256_update(&hash, buffer, got);
	if (ferror(file))
		give_up("read %s", path);
	fclose(file);
	sha256_hex(&hash, hex);
	printf("%s\n", hex);
	return PASS;
}

/* Sha256 FILE. */
int sha256_main(int argc, char **argv)
{
	sha256_choose(0);
	return hash_file(argv[argc - 1]);
}

/* Sha256-plain FILE: without the processor's SHA instructions, so that each way can be checked where both are there. */
int sha256_plain_main(int argc, char **argv)
{
	sha256_choose(1);
	return hash_file(argv[argc - 1]);
}
