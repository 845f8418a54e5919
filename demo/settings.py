"""What a run was asked for."""

from dataclasses import dataclass

from egpo_kernels.recipes import Recipe


@dataclass(frozen=True)
class Settings:
    """The command line's answers; `replay`: the loss is over what the sampler kept, which `top_p` below 1 truncates."""

    recipe: Recipe
    steps: int
    seed: int
    fused_linear: bool
    top_p: float
    replay: bool

    @property
    def sampled_from(self) -> str:
        """In words, the distribution that was sampled from and whether it is the one trained on."""
        if self.top_p == 1:
            return "the whole vocabulary"
        return f"top-p {self.top_p:g}, kept tokens {'' if self.replay else 'not '}replayed"
