"""Multi-head latent attention (DeepSeek-V2): of a token, the heads share one short vector, from which keys and values
of each are projected.

A key's product with a query, and a mixture of values, can be had from the latent vectors themselves, by projecting the
query and the mixture instead ("absorbed"). So a token's KV row is its latent vector and the one rotated part that its
keys share: a single key-value head, whose values are the first numbers of its keys.
"""

from __future__ import annotations

from typing import Final, Self

import msgspec

from hotset.runtime.model.config_file import ConfigFile

LATENT_NORM_EPS: Final = 1e-6  # whatever config.json says of the other norms


class LatentAttention(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes.

    Attributes:
        query_rank: queries are projected from so many numbers; 0: from the hidden state.
        rank: of a latent vector.
        plain_dim, rotary_dim: parts of a query or key, of which only the second is rotated; it comes last.
        value_dim: of a head's values.
    """

    query_rank: int
    rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int

    @classmethod
    def of(cls, file: ConfigFile) -> Self:
        rotary_dim = file.count("qk_rope_head_dim")
        if rotary_dim % 2:
            raise file.corrupt(f"qk_rope_head_dim is {rotary_dim}, expected an even number")
        return cls(
            query_rank=0 if file.get("q_lora_rank") is None else file.count("q_lora_rank"),
            rank=file.count("kv_lora_rank"),
            plain_dim=file.count("qk_nope_head_dim"),
            rotary_dim=rotary_dim,
            value_dim=file.count("v_head_dim"),
        )

    @property
    def query_dim(self) -> int:
        """Of a head, before its plain part is projected."""
        return self.plain_dim + self.rotary_dim

    @property
    def row_dim(self) -> int:
        """Of the single key-value head."""
        return self.rank + self.rotary_dim
