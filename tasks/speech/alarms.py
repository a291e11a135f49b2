"""What goes wrong in wav2vec 2.0 pre-training, said in words while it happens.

Three ends are known from people's reports (facts in fairseq #3718, #3687, transformers #14387): a
loss that stays at log2(K + 1), codebooks that collapse to one code each, and, following from that,
negatives that all equal the target, where the loss is 0 and the accuracy 1 while nothing is learnt.
Each is said once.
"""

from __future__ import annotations

from tasks.speech.contrastive import chance_bits

PATIENCE = 1000  # updates after which chance is worth a warning; published warm-ups are far longer
NEAR_CHANCE = 0.02  # bits
NEAR_COLLAPSE = 2.0  # times the number of codebooks
MANY_SAME = 0.5  # share of the negatives


class Alarms:
    """Watches the windows of one run. groups, codes: of the quantizer; negatives: K."""

    def __init__(self, *, groups: int, codes: int, negatives: int) -> None:
        self.groups, self.codes, self.negatives = groups, codes, negatives
        self.said: set[str] = set()

    def judge(self, *, bits: float, code_perplexity: float, same: float, updates: int) -> list[str]:
        """The warnings that a window gives for the first time.

        bits: InfoNCE. same: share of the negatives that have the target's codes.
        """
        chance = chance_bits(self.negatives)
        found = {
            "chance": updates >= PATIENCE
            and abs(bits - chance) <= NEAR_CHANCE
            and same < MANY_SAME,
            "collapse": self.codes > NEAR_COLLAPSE
            and code_perplexity < NEAR_COLLAPSE * self.groups,
            "same": same > MANY_SAME,
        }
        texts = {
            "chance": f"InfoNCE is {bits:.3f} bits after {updates} updates, chance is "
            f"{chance:.3f}: nothing is learnt yet. Small batches need a higher optim.lr or more "
            "updates",
            "collapse": f"the codebooks collapse: code perplexity {code_perplexity:.1f}, where "
            f"{self.groups} is one code for everything and {self.groups * self.codes} the most. "
            "Lower optim.lr, or raise task.diversity_weight",
            "same": f"{same:.0%} of the negatives have the codes of the true frame and are left "
            "out: InfoNCE and accuracy look better than they are",
        }
        new = [name for name, is_so in found.items() if is_so and name not in self.said]
        self.said.update(new)
        return [texts[name] for name in new]
