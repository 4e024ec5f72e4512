"""What a stage's process needs, imported once by the fork server. Floor 7."""

import temper.evals.harbour
import temper.ladder.graph
import temper.ladder.stage
import temper.methods.constitution
import temper.methods.ppo
import temper.methods.preference
import temper.methods.pretrain
import temper.methods.reward
import temper.methods.sft  # noqa: F401
