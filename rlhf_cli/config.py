"""The typed root of every configuration; `build` and what goes with it lie in `nodes.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ConfigError
from rlhf_cli.nodes import build, check_node, nearest

__all__ = ["ConfigError", "build", "check_node", "nearest", "schema"]


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class RunSection:
    """Where the run lives."""

    dir: str = "runs"  # folder that holds runs
    name: str = ""  # folder of this run inside it; empty: made from the choices and the time


@dataclass
class BatchSection:
    """One batch vocabulary: prompts x samples = rows per step."""

    prompts: int = 8  # prompts (groups) per step
    samples: int = 8  # responses per prompt
    epochs: int = 1  # passes over a step's rows
    minibatches: int = 1  # optimizer steps per pass; whole groups each
    resample: int = 1  # rollouts a step may take until batch.prompts groups survive select; 1: it is smaller then


@dataclass
class OptimSection:
    """AdamW and its schedule."""

    lr: float = 1e-6  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW moments
    eps: float = 1e-8  # AdamW epsilon
    weight_decay: float = 0.0  # decoupled weight decay
    clip: float = 1.0  # global gradient norm; 0 turns clipping off
    warmup: int = 0  # steps of linear warm-up
    schedule: str = "constant"  # constant | linear | cosine, towards zero after the last step


@dataclass
class CheckpointSection:
    """When to save, and how much to keep."""

    every: int = 10  # steps between checkpoints; 0: only at the end and when stopped
    keep: int = 2  # newest checkpoints kept
    export: bool = True  # write export/ at the end


@dataclass
class EvalSection:
    """Held-out evaluation while training, and by `rlhf eval`."""

    every: int = 0  # steps between evaluations; 0: before the first and after the last step only
    prompts: int = 96  # held-out prompts used; 0: all
    samples: int = 0  # sampled responses per prompt besides the greedy one (`rlhf eval`)
    bootstrap: int = 10000  # resamples behind the 95 % interval
    diversity: bool = False  # how varied the responses are: distinct n-grams, entropy, type-token ratio, self-BLEU


@dataclass
class GatesSection:
    """Limits that stop a run; see docs/gates.md."""

    enabled: bool = True  # turn all gates off only to debug a gate
    logp_gap: float = 0.0  # mean |sampler - learner| log-prob gap allowed, nats; 0: by precision
    advantage: float = 100.0  # largest |advantage| allowed
    constant_steps: int = 20  # steps in a row with one constant reward allowed
    failures: float = 0.1  # largest fraction of failed rewards in a step
    logp_every: int = 1  # steps between comparisons of sampler and learner log-probs
    invariance: float = 0.0  # mean |log-prob change| under re-batching allowed, nats; 0: by precision


@dataclass
class DetectorsSection:
    """Signs of reward hacking, logged under hack/; a limit that is given stops the run. See docs/gates.md."""

    enabled: bool = True  # log them
    rows: int = 32  # responses of a step whose tokens are looked at
    steps: int = 5  # steps in a row beyond a limit before the run stops
    length_corr: float | None = None  # limit of |rank correlation of score and length| over the batch; empty: none
    length_corr_within: float | None = None  # the same inside groups, their mean
    repeated: float | None = None  # limit of repeated trigrams in a response, of all, 0 to 1
    copied: float | None = None  # limit of the longest piece copied from the prompt, of the response, 0 to 1
    alike: float | None = None  # limit of trigrams that the responses to one prompt share, of all, 0 to 1
    zero_variance: float | None = None  # limit of groups whose scores are all equal, 0 to 1
    format_share: float | None = None  # limit of the part of the reward that form alone earns, 0 to 1
    truncated: float | None = None  # limit of truncated responses, 0 to 1
    similar: float | None = None  # limit of METEOR between responses to different prompts, 0 to 1
    pairs: int = 16  # pairs of such responses that a step compares; 0: none
    tail: float | None = None  # limit of the words behind the answer, of the response, 0 to 1
    answer: str = r"</answer>|\\boxed\{[^{}]*\}|####[^\n]*"  # regular expression of what an answer ends with
    inconsistent: float | None = None  # limit of a pairwise judge's comparisons that the place decided, 0 to 1
    ensemble_std: float | None = None  # limit of the deviation between several rewards, reward units
    entropy: float | None = None  # least entropy of what is sampled, nats a token
    kl: float | None = None  # limit of the KL from the reference, nats a response
    gold: str = ""  # a reward (or a part, NAME/PART) of weight 0 that the reward is compared with; empty: none
    gold_gap: float | None = None  # limit of z(reward) - z(gold), standard deviations of the first step
    gold_falls: float | None = None  # limit of how far gold fell while the reward rose, in the same units
    window: int = 20  # steps over which that is looked at


@dataclass
class LearnerSection:
    """A trained model: its head, where it starts, its own learning rate."""

    head: str = "policy"  # policy (next-token log-probs) | value (a number per token) | policy_value (both) | score (a number per row)
    path: str = ""  # folder or run to start from; empty: `model`
    lr: float | None = None  # empty: optim.lr
    starts_at: int = 0  # first step at which it is updated


@dataclass
class LoraSection:
    """Low-rank adapters through peft."""

    r: int = 0  # rank; 0 trains every weight
    alpha: float = 32.0  # scale is alpha / r
    targets: list[str] = field(default_factory=lambda: list(PROJECTIONS))  # names of the linear layers that get one
    merge_export: bool = True  # export/ holds merged weights instead of the adapter


@dataclass
class RefreshSection:
    """How a model that is only read follows the policy."""

    every: int = 0  # steps between refreshes by the policy's weights; 0: it stays as it was loaded
    decay: float = 0.0  # share of its own weights that a refresh keeps; 0 copies the policy, 0.99 is a slow average


@dataclass
class SoupSection:
    """model.reference=soup: the weight average of the model and another one."""

    path: str = ""  # the other model: a folder, a run or a Hub id
    weight: float = 0.5  # share of the other model


@dataclass
class FrozenSection:
    """A language model that is only read; frozen.NAME gives the column NAME_logp."""

    path: str = ""  # a folder, a run or a Hub id; initial: the policy as it was before training
    refresh: RefreshSection = field(default_factory=RefreshSection)


@dataclass
class ModelSection:
    """The model that is trained, and its reference."""

    path: str = ""  # a Hugging Face folder, a run, or a Hub id
    source: str = "auto"  # auto (path decides) | smollm2 (packaged weights) | tiny (random)
    revision: str = ""  # Hub revision
    reference: str = "auto"  # auto (the initial policy; under LoRA the disabled adapter) | soup | a path as above
    soup: SoupSection = field(default_factory=SoupSection)
    refresh: RefreshSection = field(default_factory=RefreshSection)  # of the reference
    trust_remote_code: bool = False  # run code that a model repository ships
    checkpointing: bool = False  # recompute activations in the backward pass
    packing: bool = True  # share prompts and drop padding inside a forward
    kernels: list[str] = field(default_factory=list)  # compared with the plain path: flex | flash | liger | compile
    chat_template: str = ""  # Jinja file that replaces the tokenizer's template
    lora: LoraSection = field(default_factory=LoraSection)


@dataclass
class DatasetSection:
    """Records, where they come from and which columns hold what."""

    format: str = "packaged"  # packaged | jsonl | json | parquet | hub
    path: str = ""  # file (train split), or Hub id
    heldout: str = ""  # file, or Hub split, of the held-out records; empty: `heldout_fraction` of the train records
    heldout_fraction: float = 0.1  # cut off by a hash of the prompt, so that it never depends on order or seed
    name: str = ""  # Hub configuration, or the data set of format=packaged (empty: quickstart)
    split: str = "train"  # Hub split
    revision: str = ""  # Hub revision
    shape: str = "prompts"  # prompts | pairs | rankings | thumbs | demonstrations
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the file's column
    answer_pattern: str = ""  # regular expression whose first group replaces each reference
    system: str = ""  # system message put before every prompt
    template: str = "{prompt}"  # text of the user turn
    chat: bool = True  # render with the tokenizer's chat template
    limit: int = 0  # use only the first N records; 0: all
    hardest: int = 0  # train only on so many prompts, chosen by what the initial policy scores on them; 0: on all
    band: str = "hardest"  # which: hardest (lowest scores) | medium (the window in the middle) | easiest | random
    max_prompt_tokens: int = 512  # longer prompts are an error before training
    max_response_tokens: int = 2048  # longer recorded responses are an error before training


@dataclass
class HardwareSection:
    """Processes, precision and memory."""

    device: str = "auto"  # auto | cpu | cuda
    processes: int = 0  # ranks on this machine; 0: one per accelerator, or one
    nodes: int = 1  # machines; ranks = nodes x processes
    hostfile: str = ""  # file of machines, NAME slots=N a line, this one first; ssh starts the others
    node_rank: int | None = None  # number of this machine, where the command is typed on every one
    master: str = ""  # HOST:PORT at which the others reach machine 0
    precision: str = "auto"  # auto (bf16 where the hardware multiplies it) | fp32 | bf16 (computes in bf16, keeps fp32 master weights)
    zero: int = 0  # DeepSpeed ZeRO stage 0-3
    offload: str = "none"  # none | cpu (optimizer state; parameters too under ZeRO-3) | nvme (both, ZeRO-3 only)
    nvme_path: str = ""  # folder on a local NVMe disk for offload=nvme
    micro_batch_tokens: int = 0  # tokens per forward; 0: by device (on a CPU one group, 1024 to 2048, bf16 from 1280)
    threads: int = 0  # threads per rank; 0: the machine's cores divided by the ranks
    timeout: int = 1800  # seconds without a heartbeat before a rank is declared hung
    deepspeed: dict[str, Any] = field(default_factory=dict)  # extra DeepSpeed keys


@dataclass
class VllmSection:
    """The engine of rollout.backend=vllm."""

    mode: str = "inprocess"  # inprocess (an engine per rank, in child processes) | server (one for all ranks)
    url: str = ""  # mode=server: a running one, e.g. http://127.0.0.1:8000; empty: started and ended with the run
    transfer: str = "auto"  # of weights: auto (by device) | files (shared memory) | ipc (same GPU) | nccl (other GPUs)
    max_model_len: int = 0  # longest prompt and response together; 0: dataset.max_prompt_tokens + rollout.max_tokens
    tensor_parallel: int = 1  # GPUs of an engine
    gpu_memory_utilization: float = 0.4  # part of a GPU's memory for weights and cache, which the learner shares
    kv_cache_gb: float = 0.0  # of the cache; 0: on a CPU for rollout.rows rows, on a GPU by gpu_memory_utilization
    enforce_eager: bool | None = None  # no compilation, no CUDA graphs; empty: on a CPU only
    sleep: int = 0  # 1: frees its GPU memory while the learner trains, weights wait in main memory; 2: drops them too
    engine: dict[str, Any] = field(default_factory=dict)  # more arguments of vllm.LLM, e.g. block_size: 32


@dataclass
class MaskSection:
    """Tokens that may be drawn: the best ones of another model. Ramamurthy et al., arXiv:2210.01241 (NLPO)."""

    model: str = ""  # name of a model in `frozen`; empty: every token
    top_p: float = 0.9  # mass of its best tokens; the token that crosses it may be drawn
    min_tokens: int = 100  # best tokens that may be drawn in any case, besides the special ones


@dataclass
class RolloutSection:
    """How responses are drawn."""

    backend: str = "builtin"  # builtin (the learner's own model) | vllm
    max_tokens: int = 64  # new tokens per response
    min_tokens: int = 0  # no EOS or stop before this many
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus mass kept
    top_k: int = 0  # best tokens kept; 0: all
    stop: list[str] = field(default_factory=list)  # texts that end a response
    rows: int = 0  # rows decoded at a time; 0: by memory
    cuda_graphs: bool = False  # builtin on a GPU: record a decoding step as a CUDA graph and replay it; compared with the model at the start
    mask: MaskSection = field(default_factory=MaskSection)
    vllm: VllmSection = field(default_factory=VllmSection)


@dataclass
class RewardWorkersSection:
    """Processes that score responses while others are still drawn."""

    processes: int = 0  # per rank; 0: half the cores, shared by the ranks, at most 16; -1: none, score in the run's own process without time-outs
    timeout: float = 30.0  # seconds per response; a worker that takes longer is killed, and the score is missing


@dataclass
class PrepassSection:
    """Responses of the initial policy to every training prompt, where a stage compares with them; see docs/shaping.md."""

    samples: int = 10  # responses per training prompt
    temperature: float | None = None  # at which they are drawn; null: as in training
    top_p: float | None = None  # their nucleus; null: as in training
    canned: str = ""  # an acceptable answer, the same to every prompt, whose rewards shaping=lsc_canned compares with
    path: str = ""  # a run, or its prepass.jsonl, whose responses and scores are used instead; empty: made before the first step


@dataclass
class JudgeSection:
    """The model that rewards such as reward=judge ask; see docs/judges.md."""

    backend: str = "openai"  # openai (an endpoint that speaks its protocol) | transformers (a model in this process) | rule (a stand-in without a model)
    url: str = ""  # base URL of the endpoint, e.g. http://127.0.0.1:8000/v1
    model: str = ""  # openai: its name there; transformers: a folder, a run, a Hub id or smollm2; rule: hash | length
    meta_model: str = ""  # openai: the one that rewrites rubrics; empty: model
    key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key, which stands nowhere else
    concurrency: int = 16  # requests at a time, per rank
    timeout: float = 60.0  # seconds per request
    retries: int = 5  # further attempts after a time-out, a lost connection, status 429 or 5xx, with growing pauses
    cache: str = "run"  # of replies: run (inside the run directory) | none | a folder that several runs share
    temperature: float = 0.0  # of the judge's replies
    max_tokens: int = 512  # of a reply; 0 leaves it to the endpoint
    structured: bool = True  # send the JSON schema of the reply; false for endpoints that refuse response_format
    device: str = "auto"  # transformers: auto (the run's) | cpu | cuda
    dtype: str = "fp32"  # transformers: fp32 | bf16
    extra: dict[str, Any] = field(
        default_factory=dict
    )  # more fields of every request, e.g. judge.extra.reasoning_effort=low


@dataclass
class SweepSection:
    """`rlhf train -m`: where its points lie, how they run, what a search improves; see docs/sweeps.md."""

    dir: str = ""  # folder that holds sweeps; empty: run.dir/sweeps
    name: str = ""  # folder of this sweep inside it; empty: made from what is swept
    parallel: int = 1  # points run side by side, each with its share of the cores or GPUs
    retry: bool = False  # run failed points again
    metric: str = ""  # search: number of a run to improve; empty: eval/reward, without held-out prompts score/mean
    direction: str = "maximize"  # search: maximize | minimize
    trials: int = 20  # search: points to try
    sampler: str = "tpe"  # search: tpe | random
    pruner: str = "median"  # search: median (stops a trial that is worse than the others' median at its step) | none
    startup: int = 5  # search: trials before the sampler and the pruner judge by the earlier ones
    seed: int = 0  # seeds the search, not the runs


@dataclass
class Root:
    """Every key that a configuration may have."""

    seed: int = 0  # seeds data order, sampling and initialisation
    steps: int = 36  # optimisation steps
    resume: str = "auto"  # auto (continue run.dir/run.name when it exists) | never | a checkpoint folder
    allow_targets: list[str] = field(default_factory=list)  # modules outside rlhf_cli whose _target_ may be built
    run: RunSection = field(default_factory=RunSection)
    batch: BatchSection = field(default_factory=BatchSection)
    optim: OptimSection = field(default_factory=OptimSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    gates: GatesSection = field(default_factory=GatesSection)
    detectors: DetectorsSection = field(default_factory=DetectorsSection)
    model: ModelSection = field(default_factory=ModelSection)
    dataset: DatasetSection = field(default_factory=DatasetSection)
    hardware: HardwareSection = field(default_factory=HardwareSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    sweep: SweepSection = field(default_factory=SweepSection)
    learners: dict[str, LearnerSection] = field(default_factory=dict)
    frozen: dict[str, FrozenSection] = field(default_factory=dict)
    source: Any = None  # conf/source
    environment: Any = None  # conf/environment: the other party of a dialogue; empty: single responses
    reward: Any = None  # conf/reward: name -> scorer with a weight
    reward_workers: RewardWorkersSection = field(default_factory=RewardWorkersSection)
    combine: Any = None  # conf/combine: how several rewards become one; empty: their weighted sum
    prepass: PrepassSection = field(default_factory=PrepassSection)
    judge: JudgeSection = field(default_factory=JudgeSection)
    shaping: Any = None  # conf/shaping: name -> function
    select: Any = None  # conf/select
    credit: Any = None  # conf/credit
    correction: Any = None  # conf/correction
    updates: dict[str, Any] = field(default_factory=dict)  # learner -> term -> {objective, reduce, coef}
    tracker: Any = None  # conf/tracker
    launcher: Any = None  # conf/launcher
    debug: dict[str, Any] = field(default_factory=dict)  # switches of conf/debug
    input: str = ""  # generate, score: the file to read
    output: str = ""  # generate, score: the file to write; empty: the terminal
    names: dict[str, str] = field(default_factory=dict)  # the chosen option of each group, for names and reports


def schema() -> Any:
    """The root as an OmegaConf structured config."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(Root)


def load_config(path: Path) -> Any:
    """The frozen configuration of a run directory, checked against the schema."""
    from omegaconf import OmegaConf

    return OmegaConf.merge(schema(), OmegaConf.load(path / "config.yaml"))
