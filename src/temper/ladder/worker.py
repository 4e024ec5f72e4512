"""What a stage's process needs, imported once by the fork server. Floor 7."""

import temper.evals.harbour
import temper.ladder.graph
import temper.ladder.stage
import temper.methods.constitution
import temper.methods.ppo
import temper.methods.preference
import temper.methods.pretrain
import temper.methods.process_reward
import temper.methods.reward
import temper.methods.sft  # noqa: F401
from temper.data.store import WORLD
from temper.ladder.stage import code_of
from temper.methods import NAMES
from temper.runs import code_version

for method in NAMES:  # remembered by every process made from here: what is edited during a run is not what ran
    code_version(*code_of(method))
code_version("temper.evals.harbour")
code_version(WORLD)
