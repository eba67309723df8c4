"""What the loop asks of its parts. A part is any object with these methods; nothing is inherited.

Shapes: T tokens of one sample, N rows and S samples of a packed Batch, L MoE layers, K experts a token, V vocabulary.
"Raises MilesError" means: a sentence for the user, the run stops. ``InfrastructureFailure`` means: issue it again.
"""

from .algorithms import (
    Advantage,
    AdvantageInputs,
    Aggregation,
    Correction,
    CorrectionInputs,
    CorrectionOutputs,
    Kl,
    Loss,
    LossInputs,
    LossOutputs,
    LossTerm,
    Unit,
)
from .cluster import Cluster, Place, Ranks
from .data import DataSource, NeedsTokenizer, Ordered, Passage, Prompt, Tokenizer
from .engine import (
    GenerateRequest,
    Generation,
    RolloutEngine,
    SamplingParams,
    SharesMemory,
    TakesBroadcasts,
    WeightSink,
    WeightSource,
    WeightTransport,
)
from .rollout import (
    Environment,
    Generate,
    GroupFilter,
    Observation,
    Players,
    Reward,
    Rollout,
    RolloutContext,
    SampleFilter,
    Score,
    Trajectory,
)
from .surroundings import BuildContext, Evaluation, Evaluator, Tracker
from .training import StepReport, Trainer

__all__ = [
    "Advantage",
    "AdvantageInputs",
    "Aggregation",
    "BuildContext",
    "Cluster",
    "Correction",
    "CorrectionInputs",
    "CorrectionOutputs",
    "DataSource",
    "Environment",
    "Evaluation",
    "Evaluator",
    "Generate",
    "GenerateRequest",
    "Generation",
    "GroupFilter",
    "Kl",
    "Loss",
    "LossInputs",
    "LossOutputs",
    "LossTerm",
    "NeedsTokenizer",
    "Observation",
    "Ordered",
    "Passage",
    "Place",
    "Players",
    "Prompt",
    "Ranks",
    "Reward",
    "Rollout",
    "RolloutContext",
    "RolloutEngine",
    "SampleFilter",
    "SamplingParams",
    "Score",
    "SharesMemory",
    "StepReport",
    "Tokenizer",
    "TakesBroadcasts",
    "Tracker",
    "Trainer",
    "Trajectory",
    "Unit",
    "WeightSink",
    "WeightSource",
    "WeightTransport",
]
