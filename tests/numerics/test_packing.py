import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.packing import pack, unpack


@given(
    st.integers(1, 5), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 5, 8]), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_unpack_inverts_pack(n, m, bits, signed, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = torch.randint(low, high, (n, m), generator=generator).to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == -(-n * m * bits // 8)
    back = unpack(packed, bits, (n, m), signed)
    assert back.dtype == codes.dtype and torch.equal(back, codes)


def test_three_bits_run_together_little_end_first():
    # 1, 2, 3 in three bits each: 001, 010, 011 -> 0b11_010_001 and the rest 0b0
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist() == [0b11010001, 0]
