"""Every setting of a run with its type, bounds, default and meaning; `RunConfig` adds what spans several."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"
LARGEST_EXACT = 2**53
"""Largest whole number that survives a protobuf Struct, which carries every number as a double."""


def _whole_to_int(value: object) -> object:
    """Turn 5.0 into 5: a Struct gives every number back as a double."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Int = Annotated[int, BeforeValidator(_whole_to_int)]
PositiveInt = Annotated[int, BeforeValidator(_whole_to_int), Field(ge=1, le=LARGEST_EXACT)]
Count = Annotated[int, BeforeValidator(_whole_to_int), Field(ge=0, le=LARGEST_EXACT)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Settings(BaseModel):
    """The settings one by one.

    Field names are the flat kebab-case keys of ``flwr run --run-config`` and ``espalier run -c`` with
    underscores. Times are in seconds; `warmup_steps` counts optimiser steps, `rounds` and `prune_at` rounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    method: str = Field(default="fedphd", description="federated method, a name of the registry")
    model: str = Field(default="unet-tiny", min_length=1, description="model preset; it settles the task")
    seed: Count = Field(default=2023, description="seed all randomness of the run derives from")
    reproducible: bool = Field(
        default=False,
        description="the same bits again, over kills and resumes: CPUs only, one thread, sums in a fixed order",
    )

    rounds: PositiveInt = Field(default=60, description="edge rounds in all")
    rg: PositiveInt = Field(
        default=5, description="edge rounds per window, i.e. between two cloud aggregations"
    )
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of the clients that train in a round")
    min_edges: PositiveInt = Field(default=1, description="edges that must have joined before the run starts")
    min_clients: PositiveInt = Field(
        default=1, description="clients that must have joined before the run starts"
    )

    local_epochs: PositiveInt = Field(default=1, description="epochs a client trains per round")
    batch_size: PositiveInt = Field(default=32, description="images per optimiser step")
    local_steps: Count = Field(
        default=0, description="optimiser steps a client takes per round; 0: local-epochs epochs"
    )
    optimizer: Literal["auto", "adam", "sgd"] = Field(
        default="auto", description="clients' optimiser; auto: Adam for diffusion, SGD for classifiers"
    )
    learning_rate: NonNegative = Field(
        default=0.0, description="step size after warm-up; 0: 0.001 with Adam, 0.05 with SGD"
    )
    learning_rate_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor on the step size after each round"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="SGD's momentum, new in every round")
    weight_decay: NonNegative = Field(default=0.0, description="L2 penalty in the optimiser")
    warmup_steps: Count = Field(
        default=100, description="Adam's steps over which the step size rises linearly"
    )
    clip_norm: NonNegative = Field(default=1.0, description="largest gradient norm; 0 does not clip")
    flip: bool = Field(default=False, description="mirror training images at random")
    keep_optimizer: bool = Field(default=True, description="clients keep Adam's moments from round to round")

    selection: Literal[
        "auto", "uniform", "proportional", "bernoulli", "pow-d", "cpow-d", "rpow-d", "divfl"
    ] = Field(default="auto", description="who trains in a round; auto: as the method says")
    candidates: Count = Field(
        default=0, description="d of Power-of-Choice, clients asked for their loss; 0: twice those picked"
    )
    adaptive_candidates: bool = Field(
        default=False, description="d falls by half steps from everyone to those picked (adapow-d)"
    )
    loss_weight: Literal["none", "samples"] = Field(
        default="none", description="Power-of-Choice ranks candidates by F_k, or by n_k F_k"
    )
    divfl_gradients: Literal["ideal", "no-overhead"] = Field(
        default="no-overhead",
        description="whose gradients DivFL renews in a round: everyone's, the picked ones'",
    )
    divfl_greedy: Literal["greedy", "lazy", "stochastic"] = Field(
        default="lazy", description="how DivFL's facility location is maximised"
    )
    weighting: Literal["auto", "samples", "uniform"] = Field(
        default="auto", description="a client's weight in a mean; auto: as method and selection say"
    )

    edge_choice: Literal["auto", "homogeneity", "random", "fixed", "shape"] = Field(
        default="auto", description="how a client's edge is chosen; auto: as the method says"
    )
    shape_diversity: NonNegative = Field(
        default=1.0, description="ShapeFL: weight of the diversity of edge data against communication cost"
    )
    shape_edges: Count = Field(default=0, description="ShapeFL: edges that aggregate; 0: as many as pay off")
    selection_a: float = Field(
        default=10000.0, description="a of the edge choice, p_e ~ ReLU(a mu - n_e + b)"
    )
    selection_b: float = Field(default=0.0, description="b of the edge choice")
    aggregation_a: float = Field(
        default=5000.0, description="a of the cloud weights, rho_e ~ ReLU(n_e + a mu_e + b)"
    )
    aggregation_b: float = Field(default=0.0, description="b of the cloud weights")
    homogeneity_form: Literal["root", "squared"] = Field(
        default="root", description="form of the statistical homogeneity score"
    )
    rho_count: Literal["window", "last-round"] = Field(
        default="window", description="samples that n_e counts"
    )

    histogram_epsilon: NonNegative = Field(
        default=0.0, description="epsilon of the Laplace noise on label histograms; 0: exact counts"
    )
    dp_sgd_noise: NonNegative = Field(
        default=0.0,
        description="DP-SGD: noise multiplier; an image's gradient is clipped to clip-norm; 0: off",
    )
    dp_sgd_epsilon: NonNegative = Field(
        default=0.0,
        description="DP-SGD: or the epsilon of the whole run, to which each client fits its noise",
    )
    dp_delta: float = Field(default=1e-5, gt=0, lt=1, description="delta that epsilons are reported for")
    update_clip: NonNegative = Field(
        default=0.0, description="largest L2 norm of what a client changes in a round; 0 does not clip"
    )
    update_noise: NonNegative = Field(
        default=0.0, description="Gaussian noise on it, as a multiple of update-clip; 0: off"
    )

    prox_mu: NonNegative = Field(default=0.01, description="FedProx: weight of the proximal term")
    moon_mu: NonNegative = Field(default=1.0, description="MOON: weight of the contrastive term")
    moon_temperature: Positive = Field(default=0.5, description="MOON: temperature of the contrastive term")
    dyn_alpha: Positive = Field(
        default=0.1, description="FedDyn and DepthFL: weight of the dynamic regulariser"
    )
    server_rate: Positive = Field(default=1.0, description="SCAFFOLD: step size of the servers")
    fairness_q: NonNegative = Field(default=1.0, description="q-FedAvg: exponent; 0 is a plain mean")

    levels: str = Field(
        default="1,0.5,0.25", description="sizes of sub-models as shares of the whole, commas between"
    )
    level_choice: Literal["spread", "device", "memory", "speed"] = Field(
        default="spread",
        description="who trains which level: evenly by name, set at the device, by memory, by measured speed",
    )
    dynamic_levels: bool = Field(default=False, description="HeteroFL: draw the levels anew in every round")
    masked_loss: bool = Field(default=True, description="HeteroFL: leave out the labels a client lacks")
    width_scaler: bool = Field(
        default=True, description="HeteroFL: scale a narrow layer's output in training"
    )
    distillation: bool = Field(
        default=True, description="FjORD, DepthFL: teach small sub-models by larger ones"
    )
    inclusive_beta: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="InclusiveFL: share of the deeper tier's momentum in a last layer",
    )
    base_width: float = Field(default=0.125, gt=0, le=1, description="Split-Mix: width of a base network")

    clusters: PositiveInt = Field(default=2, description="IFCA: number of models")
    shared_layers: str = Field(
        default="", description="IFCA: prefixes of the tensors all clusters share, commas between"
    )
    cfl_mean_norm: Positive = Field(
        default=0.4, description="CFL: a cluster splits only if its mean update is shorter (eps1)"
    )
    cfl_max_norm: Positive = Field(
        default=1.6, description="CFL: and one of its clients' updates is longer (eps2)"
    )
    cfl_from_round: PositiveInt = Field(default=20, description="CFL: first round that may split")
    cfl_linkage: Literal["single", "complete"] = Field(
        default="single", description="CFL: optimal bipartition, or the one of the authors' code"
    )

    families: str = Field(
        default="", description="unlike clients: a family of models (HtFE-img-8, …) or models, commas between"
    )
    soft_label_weight: NonNegative = Field(default=1.0, description="FD: weight gamma of the soft labels")
    prototype_weight: NonNegative = Field(default=1.0, description="FedProto: weight of the prototypes")
    peer_weight: NonNegative = Field(default=1.0, description="co-distillation: weight of the peers' mean")
    peer_every: PositiveInt = Field(default=1, description="co-distillation: rounds between two exchanges")
    peer_burn_in: Count = Field(default=1, description="co-distillation: first rounds without peers")
    transfer_weight: NonNegative = Field(default=50.0, description="FedKTL: weight mu of the generated pairs")
    alignment_weight: NonNegative = Field(default=1.0, description="FedKTL: weight lambda of the centroids")
    alignment_epochs: PositiveInt = Field(
        default=100, description="FedKTL: epochs of the cloud's transformer"
    )
    alignment_rate: Positive = Field(default=0.01, description="FedKTL: its step size (Adam)")
    pair_pixels: Literal["uint8", "float32"] = Field(
        default="uint8", description="FedKTL: how generated images cross the links"
    )
    generator: str = Field(
        default="",
        description="FedKTL: gan:DIR, espalier:DIR, sd:DIR, stylegan-xl:FILE or stylegan3:FILE at the cloud",
    )
    generator_steps: PositiveInt = Field(default=50, description="denoising steps of a diffusion generator")
    prompt: str = Field(
        default="a cat", description="FedKTL with Stable Diffusion: the prompt of every class"
    )
    trust_pickle: bool = Field(
        default=False, description="open StyleGAN pickles, which can run any code on the cloud's machine"
    )
    augment: Literal["none", "faug"] = Field(
        default="none", description="faug: clients fill up labels they lack with images of a shared generator"
    )
    faug_scarce: float = Field(
        default=0.5, gt=0, le=1, description="FAug: a label below this share of the client's mean is a target"
    )
    faug_seeds: PositiveInt = Field(default=5, description="FAug: most images a client uploads per label")
    faug_redundant: Count = Field(
        default=0, description="FAug: labels uploaded beside the targets to hide them"
    )
    faug_steps: PositiveInt = Field(default=1000, description="FAug: training steps of the conditional GAN")

    exchange: Literal["full", "usplit", "ulatdec", "udec"] = Field(
        default="usplit", description="FedDiffuse: parts of the U-Net that cross the links"
    )
    shared_data: str = Field(
        default="", description="Phoenix: data the cloud hands a part of to every client"
    )
    shared_count: Count = Field(default=0, description="Phoenix: images of it that every client gets")
    personal_layers: str = Field(
        default="", description="Phoenix: prefixes of the tensors that stay at home, commas between"
    )
    quality_threshold: NonNegative = Field(
        default=0.0, description="Phoenix: largest loss, as a multiple of the median, that is let in; 0: any"
    )

    codec: Literal["auto", "none", "fp16", "bf16", "qsgd", "top-k"] = Field(
        default="auto", description="how clients' updates are coded; auto: as the method says"
    )
    codec_levels: Int = Field(
        default=7, ge=1, le=2**23 - 1, description="QSGD: levels s; 7 takes 4 bits a number"
    )
    codec_norm: Literal["whole", "tensor"] = Field(
        default="whole", description="QSGD: one norm for the whole difference, or one per tensor"
    )
    codec_keep: float = Field(
        default=0.05, gt=0, le=1, description="top-k: share of the numbers that is sent"
    )

    downlink: Literal["none", "fp16", "bf16"] = Field(
        default="none", description="how the network's tensors travel down, to edges and clients"
    )
    edge_codec: Literal["none", "fp16", "bf16", "qsgd", "top-k"] = Field(
        default="none", description="how edges' reports of the network are coded on their way to the cloud"
    )

    sparse_weight: NonNegative = Field(
        default=1e-5, description="weight of the group-norm penalty before pruning"
    )
    pruning_ratio: float = Field(
        default=0.2, description="share of the channels that pruning removes; 0 does not prune"
    )
    prune_at: Count = Field(
        default=0, description="round R_s after which the model is pruned; 0: a third of the rounds"
    )

    ema_decay: float = Field(default=0.0, ge=0, lt=1, description="decay of the averaged model; 0 keeps none")
    timesteps: PositiveInt = Field(default=1000, description="diffusion steps in training")
    beta_start: float = Field(default=0.0001, gt=0, lt=1, description="first beta of the linear schedule")
    beta_end: float = Field(default=0.02, gt=0, lt=1, description="last beta of the linear schedule")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="arithmetic of training")
    device: str = Field(default="auto", pattern=_DEVICE, description="where the cloud computes")

    eval_data: str = Field(default="", description="data the cloud may measure against; empty: no measures")
    eval_clients: bool = Field(
        default=False, description="clients measure a classifier on their own test images, too"
    )
    eval_every: PositiveInt = Field(default=1, description="windows between two evaluations")
    eval_samples: Int = Field(
        default=500, ge=2, le=LARGEST_EXACT, description="images drawn for an evaluation"
    )
    sample_steps: PositiveInt = Field(default=50, description="DDIM steps")
    sample_count: PositiveInt = Field(default=64, description="images in a sample grid")
    features: Literal["classifier", "inception"] = Field(
        default="classifier", description="features quality is measured in"
    )

    round_deadline: Positive = Field(
        default=600.0, description="seconds an edge waits for its clients' replies"
    )
    adaptive_deadline: bool = Field(
        default=True,
        description="an edge waits three times as long as it expects its slowest client to take, at least 10 s; "
        "round-deadline is the most",
    )
    window_deadline: NonNegative = Field(
        default=0.0, description="seconds the cloud waits for its edges; 0: rg round deadlines and a margin"
    )
    quorum: PositiveInt = Field(default=1, description="replies an edge needs for a round to count")
    hello_timeout: Positive = Field(
        default=120.0, description="seconds the cloud waits for edges and clients to join"
    )
    require_signatures: bool = Field(
        default=True, description="refuse clients' updates that are not signed with their node keys"
    )
    keep_checkpoints: PositiveInt = Field(
        default=3, description="newest checkpoints kept, beside the best one"
    )

    out: str = Field(default="", description="folder of the run on the cloud's machine")
    run_id: str = Field(
        default="", description="Espalier's name of the run, kept by a resume; empty: a new one"
    )
