"""Losses on 2 and 3 real gloo processes: loss and parameter gradients under DDP averaging are those of one process with all pairs.

Starting processes is slow, so each world is started once a session and runs every case; a test only compares what came back.
To cover another loss add a line to CASES. To look at another operation add a function to CHECKS.
This file is also the script that the processes run: python test_processes.py FOLDER RANK WORLD
"""
import datetime, os, subprocess, sys, time, traceback
from dataclasses import dataclass
from pathlib import Path
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUTS = {2: dict(even=(4, 4), uneven=(6, 3), empty=(9, 0)), 3: dict(even=(3, 3, 3), uneven=(4, 4, 1), empty=(5, 0, 4))}     # pairs of each process
DTYPES = {'float64': (torch.float64, 1e-10), 'float32': (torch.float32, 1e-6)}        # and the largest relative difference allowed


def runs(name, world):
    "Layouts and precisions in which a case is run: float64 shows that the arithmetic is the same, float32 on the uneven batch what rounding leaves of it."
    for layout, counts in LAYOUTS[world].items():
        if layout == 'empty' and name in NO_EMPTY: continue
        for kind, (dtype, allowed) in DTYPES.items():
            if kind == 'float64' or layout == 'uneven': yield f'{name}/{layout}/{kind}', counts, dtype, allowed


@dataclass
class Share:
    "What one process of a world holds; `group` is None for the one process that holds everything. n, m: its images and captions; N, M: everybody's."
    image_features: Tensor      # (n,5) unit norm, pair i is image i and text i
    text_features: Tensor       # (n,5)
    logit_scale: Tensor         # ()
    logit_bias: Tensor          # ()
    ids: Tensor                 # (n,) int64 of the pairs, some repeated on other processes
    caption_features: Tensor    # (m,5) more texts than images
    caption_ids: Tensor         # (m,)
    aux_image: Tensor           # (n,4) unit norm, another model's (H, guide, momentum)
    aux_text: Tensor            # (n,4)
    momentum_image: Tensor      # (n,5) unit norm, the momentum model's
    momentum_text: Tensor       # (n,5)
    keep: Tensor                # (n,N) bool, columns are the texts of all processes
    extra_image: Tensor         # (n,2,5) unit norm, negatives of each text alone
    extra_text: Tensor          # (n,2,5) unit norm, negatives of each image alone
    queue_image: Tensor         # (6,5) unit norm, the same on every process
    queue_text: Tensor          # (6,5)
    queue_aux_image: Tensor     # (6,4)
    queue_aux_text: Tensor      # (6,4)
    queue_ids: Tensor           # (6,)
    group: object               # process group or None


class Towers(nn.Module):
    "Two linear towers and the two learned numbers."
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 5, dtype=dtype), nn.Linear(7, 5, dtype=dtype)
        self.log_logit_scale, self.logit_bias = nn.Parameter(torch.tensor(1.5, dtype=dtype)), nn.Parameter(torch.tensor(-2., dtype=dtype))

    def forward(self, images, texts, captions):
        norm = lambda x: F.normalize(x, dim=1)
        return norm(self.image(images)), norm(self.text(texts)), norm(self.text(captions)), self.log_logit_scale.exp(), 1 * self.logit_bias


def world_data(counts, dtype):
    "Inputs of all processes, and for each kind of row its number on every process."
    g = torch.Generator().manual_seed(sum(counts))
    N, M = sum(counts), sum(counts) + 4 * len(counts)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    unit = lambda *shape: F.normalize(draw(*shape), dim=-1)
    ids = torch.tensor([0, 1, 0, 2, 3, 1, 4, 5, 0])[:N]
    keep = (torch.rand(N, N, generator=g) > 0.2) | (ids[:, None] == ids)
    per_pair = dict(images=draw(N, 6), texts=draw(N, 7), ids=ids, aux_image=unit(N, 4), aux_text=unit(N, 4), momentum_image=unit(N, 5), momentum_text=unit(N, 5),
                    keep=keep, extra_image=unit(N, 2, 5), extra_text=unit(N, 2, 5))
    per_caption = dict(captions=draw(M, 7), caption_ids=ids[torch.arange(M) % N])
    queue = dict(queue_image=unit(6, 5), queue_text=unit(6, 5), queue_aux_image=unit(6, 4), queue_aux_text=unit(6, 4), queue_ids=torch.tensor([0, 7, 3, 8, 9, 1]))
    return per_pair, per_caption, queue


def run_case(case, counts, dtype, rank=None, group=None):
    "Loss and averaged parameter gradients: of process `rank` of a world, or of one process with everything."
    per_pair, per_caption, queue = world_data(counts, dtype)
    if rank is not None:
        cut = lambda rows, sizes: {k: x.split(list(sizes))[rank] for k, x in rows.items()}
        per_pair, per_caption = cut(per_pair, counts), cut(per_caption, [c + 4 for c in counts])
    towers = Towers(dtype)
    model = towers if group is None else nn.parallel.DistributedDataParallel(towers, process_group=group)
    v, t, c, scale, bias = model(per_pair.pop('images'), per_pair.pop('texts'), per_caption.pop('captions'))
    loss = case(Share(image_features=v, text_features=t, caption_features=c, logit_scale=scale, logit_bias=bias, group=group, **per_pair, **per_caption, **queue))
    (loss + 0 * (v.sum() + t.sum() + scale + bias)).backward()               # DDP wants every parameter to take part
    return dict(loss=loss.detach(), **{k: p.grad for k, p in towers.named_parameters()})


# Cases: losses written as a user would. Each imports what it needs itself. -----------------------------------------------------------------------

def gathered_softmax(s):
    "InfoNCE written out: every process computes its own rows and columns against everybody's features."
    from vlwb.losses.processes import gather_rows, row_range, total
    v, t = gather_rows(s.image_features, s.group), gather_rows(s.text_features, s.group)
    start, stop, n = row_range(len(s.image_features), s.group)
    own = torch.arange(start, stop)
    per_image, per_text = s.logit_scale * s.image_features @ t.T, s.logit_scale * s.text_features @ v.T
    return total(F.cross_entropy(per_image, own, reduction='sum') + F.cross_entropy(per_text, own, reduction='sum'), s.group) / (2 * n)


def gathered_everywhere(s):
    "The whole loss on every process, from gathered features alone; no total."
    from vlwb.losses.processes import gather_rows
    v, t = gather_rows(s.image_features, s.group), gather_rows(s.text_features, s.group)
    logits = s.logit_scale * v @ t.T
    return (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diag()).mean()


def ring_softplus(s):
    "A function of all pairs with its columns sent around."
    from vlwb.losses.blocks import sum_over_ring
    function = lambda v, t, scale: F.softplus(scale * v @ t.T).square().sum()
    return sum_over_ring(function, (s.image_features,), (s.caption_features,), (s.logit_scale,), block=2, group=s.group)


def ring_times_own(s):
    "What comes after the ring may differ between processes: here each multiplies by a number of its own features."
    from vlwb.losses.blocks import sum_over_ring
    from vlwb.losses.processes import total
    ring = sum_over_ring(lambda v, t: (v @ t.T).exp().sum(), (s.image_features,), (s.text_features,), block=2, group=s.group)
    return total(ring * s.image_features.square()[:, 0].sum(), s.group)


def siglip_case(**which):
    def case(s):
        from vlwb.losses.siglip import siglip
        texts = s.caption_features if which.get('captions') else s.text_features
        ids = dict(diagonal={}, ids=dict(image_ids=s.ids), names=dict(image_ids=[f'photo {i}' for i in s.ids.tolist()]), captions=dict(image_ids=s.ids, text_image_ids=s.caption_ids))[which['ids']]
        if which.get('mask'):
            from vlwb.losses.processes import gather_ids
            ids = dict(positives=s.ids[:, None] == gather_ids(s.ids, s.group))
        return siglip(s.image_features, texts, s.logit_scale, logit_bias=s.logit_bias, keep=s.keep if which.get('keep') else None, block=2, group=s.group, **ids)
    return case


def everybody(x, s):
    "Columns of all processes for this one's rows."
    from vlwb.losses.processes import gather_rows
    return gather_rows(x, s.group)


def infonce_case(captions=False, keep=False, queue=False, extra=False, **kw):
    def case(s):
        from vlwb.losses.infonce import infonce
        more = dict(image_ids=s.ids, group=s.group, **kw)
        if captions: more |= dict(text_image_ids=s.caption_ids)
        if keep: more |= dict(keep=s.keep)
        if queue: more |= dict(text_queue=s.queue_text, image_queue=s.queue_image, queue_ids=s.queue_ids)
        if extra: more |= dict(extra_text_features=s.extra_text, extra_image_features=s.extra_image)
        return infonce(s.image_features, s.caption_features if captions else s.text_features, s.logit_scale, **more)
    return case


def srcl_case(keep=False, queue=False, extra=False, matrix=False, **kw):
    def case(s):
        from vlwb.losses.srcl import srcl
        more = dict(image_ids=s.ids, group=s.group, similarity_temperature=0.3, **kw)
        if matrix: more |= dict(aux_similarity=s.aux_image @ everybody(s.aux_text, s).T)
        elif kw.get('alpha', 1): more |= dict(aux_image_features=s.aux_image, aux_text_features=s.aux_text)
        if keep: more |= dict(keep=s.keep)
        if queue: more |= dict(text_queue=s.queue_text, image_queue=s.queue_image, queue_ids=s.queue_ids)
        if queue and kw.get('alpha', 1): more |= dict(aux_text_queue=s.queue_aux_text, aux_image_queue=s.queue_aux_image)
        if extra: more |= dict(extra_text_features=s.extra_text, extra_image_features=s.extra_image)
        return srcl(s.image_features, s.text_features, s.logit_scale, **more)
    return case


def albef_case(queue=False, **kw):
    def case(s):
        from vlwb.losses.albef import albef_itc
        more = dict(image_queue=s.queue_image, text_queue=s.queue_text, queue_ids=s.queue_ids) if queue else {}
        return albef_itc(s.image_features, s.text_features, s.logit_scale, momentum_image_features=s.momentum_image, momentum_text_features=s.momentum_text, image_ids=s.ids, group=s.group, **more, **kw)
    return case


def momentum_case(queue=False, **kw):
    def case(s):
        from vlwb.losses.momentum import momentum_contrast
        more = dict(image_queue=s.queue_image, text_queue=s.queue_text, queue_ids=s.queue_ids) if queue else {}
        if kw.get('alpha'): more |= dict(aux_image_features=s.aux_image, aux_text_features=s.aux_text)
        if kw.get('alpha') and queue: more |= dict(aux_image_queue=s.queue_aux_image, aux_text_queue=s.queue_aux_text)
        return momentum_contrast(s.image_features, s.text_features, s.logit_scale, momentum_image_features=s.momentum_image, momentum_text_features=s.momentum_text, image_ids=s.ids, group=s.group, similarity_temperature=0.3, **more, **kw)
    return case


def momentum_mask(s):
    "Known positives as a mask whose columns are the texts of all processes."
    from vlwb.losses.momentum import momentum_contrast
    return momentum_contrast(s.image_features, s.text_features, s.logit_scale, momentum_image_features=s.momentum_image, momentum_text_features=s.momentum_text, positives=s.ids[:, None] == everybody(s.ids, s), group=s.group)


def masked_tokens(s):
    "Features as the logits of five tokens; each process masks its rows as one process would, and nothing may be masked on one of them."
    from vlwb.losses.processes import row_range
    from vlwb.train.masking import mask_tokens, mlm_loss
    ids = torch.stack([s.ids % 5, 0 * s.ids, (s.ids + 1) % 5], 1)
    _, labels = mask_tokens(ids, mask_token_id=5, vocab_size=5, special_ids=(5,), share=0.5, generator=torch.Generator().manual_seed(0), rows=row_range(len(ids), s.group))
    logits, slow = (torch.stack([v, t, v * t], 1) for v, t in ((s.image_features, s.text_features), (s.momentum_image, s.momentum_text)))
    return mlm_loss(logits, labels, slow, soft_weight=0.4, group=s.group)


def vse_case(**kw):
    def case(s):
        from vlwb.losses.vse import vse
        return vse(s.image_features, s.caption_features, image_ids=s.ids, text_image_ids=s.caption_ids, group=s.group, **kw)
    return case


def debiased_case(name, keep=False, **kw):
    def case(s):
        import vlwb.losses.debiased as debiased
        return getattr(debiased, name)(s.image_features, s.text_features, s.logit_scale, image_ids=s.ids, keep=s.keep if keep else None, group=s.group, **kw)
    return case


def gist_case(**kw):
    def case(s):
        from vlwb.losses.gist import gist
        return gist(s.image_features, s.text_features, s.logit_scale, guide_image_features=s.aux_image, guide_text_features=s.aux_text, image_ids=s.ids, group=s.group, **kw)
    return case


def cyclip_case(keep=False):
    def case(s):
        from vlwb.losses.cyclip import cyclip
        return cyclip(s.image_features, s.text_features, s.logit_scale, image_ids=s.ids, keep=s.keep if keep else None, group=s.group)
    return case


def soft_case(matrix=False, **kw):
    def case(s):
        from vlwb.losses.soft import soft_targets
        targets = dict(target_image_features=s.aux_image, target_text_features=s.aux_text)
        if matrix: targets = dict(targets=(5 * s.aux_image @ everybody(s.aux_text, s).T).softmax(1))
        return soft_targets(s.image_features, s.text_features, s.logit_scale, image_ids=s.ids, group=s.group, **targets, **kw)
    return case


CASES = {                                                # name -> function of a Share that gives a loss
    'gathered softmax': gathered_softmax,
    'gathered everywhere': gathered_everywhere,
    'ring softplus': ring_softplus,
    'ring times own': ring_times_own,
    'siglip': siglip_case(ids='diagonal'),
    'siglip ids': siglip_case(ids='ids'),
    'siglip names': siglip_case(ids='names'),
    'siglip captions': siglip_case(ids='captions', captions=True),
    'siglip keep': siglip_case(ids='ids', keep=True),
    'siglip masks': siglip_case(ids='ids', keep=True, mask=True),
    'infonce': infonce_case(),
    'infonce each': infonce_case(multi_positive='each'),
    'infonce captions': infonce_case(captions=True),
    'infonce keep': infonce_case(keep=True),
    'infonce queue': infonce_case(queue=True),
    'infonce extra': infonce_case(extra=True),
    'srcl H': srcl_case(alpha=1.),
    'srcl both views': srcl_case(alpha=0.4, keep=True),
    'srcl softmax': srcl_case(alpha=0.4, norm='softmax', delta=0.5),
    'srcl own': srcl_case(alpha=0.),
    'srcl matrix': srcl_case(alpha=0.7, matrix=True),
    'srcl queue extra': srcl_case(alpha=0.4, queue=True, extra=True, multi_positive='each'),
    'albef': albef_case(),
    'albef queue': albef_case(queue=True, soft_weight=0.3),
    'momentum': momentum_case(),
    'momentum mask': momentum_mask,
    'momentum queue each': momentum_case(queue=True, multi_positive='each'),
    'momentum srcl own': momentum_case(weights='srcl', alpha=0., queue=True),
    'momentum srcl queue': momentum_case(weights='srcl', alpha=0.4, queue=True),
    'momentum removal': momentum_case(weights='removal', alpha=0.4, queue=True, threshold=0.8),
    'masked tokens': masked_tokens,
    'vse max': vse_case(),
    'vse sum mean': vse_case(hardest=False, reduction='mean'),
    'dcl': debiased_case('dcl', tau_plus=0.1),
    'hcl keep': debiased_case('hcl', keep=True, beta=0.7, tau_plus=0.1),
    'gist': gist_case(),
    'gist intra': gist_case(intra=True, margin=0.1),
    'cyclip': cyclip_case(),
    'cyclip keep': cyclip_case(keep=True),
    'soft features': soft_case(),
    'soft matrix mix': soft_case(matrix=True, mix=0.6),
}
def own_rows_put_back(s):
    "What must not pass: gathered without gradients, the own part put back. Not a form this package has."
    from vlwb.losses.infonce import infonce
    from vlwb.losses.processes import row_range
    if s.group is None: return infonce(s.image_features, s.text_features, s.logit_scale)
    start, stop, n = row_range(len(s.image_features), s.group)
    everything = []
    for x in (s.image_features, s.text_features):
        rows = everybody(x.detach(), s).clone()
        everything.append(torch.cat([rows[:start], x, rows[stop:]]))
    return infonce(*everything, s.logit_scale)


NO_EMPTY = set()                                         # names of cases that do not take a process without any pair


# Checks of the operations themselves: each runs on every process and raises when something is wrong. ----------------------------------------------

def check_gather_dtypes(group, rank, world):
    from vlwb.losses.processes import gather_rows
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        for sizes in ([2] * world, list(range(world)), [0] * world):
            for shape in ((), (3,), (2, 3), (0,)):
                everything = torch.arange(sum(sizes) * 6).reshape(sum(sizes), 6)[:, :max(1, torch.Size(shape).numel())].to(dtype)
                if 0 in shape: everything = everything[:, :0]
                everything = everything.reshape(sum(sizes), *shape)
                out = gather_rows(everything.split(sizes)[rank], group)
                assert out.dtype == dtype and out.shape == everything.shape and torch.equal(out, everything), (dtype, sizes, shape)


def check_gather_backward(group, rank, world):
    "Process r asks r + 1 times for every row: each row gets the sum; half-precision gradients add up in float32."
    from vlwb.losses.processes import gather_rows
    for dtype in (torch.float64, torch.bfloat16):
        for n in (2, rank):
            x = torch.ones(n, 3, dtype=dtype, requires_grad=True)
            (gather_rows(x, group) * (rank + 1)).sum().backward()
            assert x.grad.dtype == dtype and torch.equal(x.grad, torch.full_like(x, world * (world + 1) / 2))


def check_total(group, rank, world):
    from vlwb.losses.processes import total
    x = torch.tensor([1., rank], requires_grad=True)
    out = total(x, group)
    (out * torch.tensor([1., rank])).sum().backward()
    assert out.tolist() == [world, world * (world - 1) / 2] and x.grad.tolist() == [world, world * (world - 1) / 2]
    assert total(torch.tensor(rank > 0), group).item() == world - 1
    assert total(torch.tensor(1, dtype=torch.bfloat16), group).dtype == torch.bfloat16


def check_ids(group, rank, world):
    from vlwb.losses.processes import gather_ids, row_counts, row_range
    assert gather_ids(torch.arange(rank), group).tolist() == [i for r in range(world) for i in range(r)]
    assert gather_ids([f'Grüße {rank}'] * rank, group) == [f'Grüße {r}' for r in range(world) for _ in range(r)]
    assert gather_ids(None, group) is None
    assert row_counts(rank, group) == tuple(range(world)) and row_range(2, group) == (2 * rank, 2 * rank + 2, 2 * world)


def check_refusals(group, rank, world):
    "What does not fit together is the same ValueError on every process, and the group still works afterwards."
    from vlwb.losses.processes import gather_rows
    for mine in (torch.zeros(2, 3 + rank), torch.zeros(2, 3, dtype=torch.float64 if rank else torch.float32)):
        with pytest.raises(ValueError, match='one width and dtype'): gather_rows(mine, group)
    assert len(gather_rows(torch.zeros(1, 3), group)) == world


def check_ring(group, rank, world):
    "After one step everybody holds the previous process's tensors, after `world` steps the own."
    from vlwb.losses.processes import pass_around
    held = torch.full((rank, 2), float(rank)), torch.full((rank,), rank % 2 == 0), None
    for step in range(1, world + 1):
        source = (rank - step) % world
        held = pass_around(held, source, group)
        assert held[0].shape == (source, 2) and (held[0] == source).all() and held[1].dtype == torch.bool and (held[1] == (source % 2 == 0)).all() and held[2] is None


def check_small_groups(group, rank, world):
    "A group of the last two processes, and one of each process alone."
    from vlwb.losses.processes import gather_rows
    from vlwb.losses.siglip import siglip
    v = F.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    pair, alone = dist.new_group([world - 2, world - 1]), [dist.new_group([r]) for r in range(world)][rank]
    assert torch.equal(gather_rows(v, alone), v)
    torch.testing.assert_close(siglip(v, v.flip(0), 10., group=alone), siglip(v, v.flip(0), 10.))
    if rank < world - 2: return
    mine = slice(0, 3) if rank == world - 2 else slice(3, 4)
    assert torch.equal(gather_rows(v[mine], pair), v)
    torch.testing.assert_close(siglip(v[mine], v.flip(0)[mine], 10., group=pair), siglip(v, v.flip(0), 10.))


def check_memory(group, rank, world):
    "No tensor of SigLIP's ring is larger than the features of one process or a block of pairs, gathered ids apart."
    from vlwb.losses.siglip import siglip
    class Largest(TorchDispatchMode):
        numel = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor))])
            return out
    v, t = (F.normalize(torch.randn(64, 4, generator=torch.Generator().manual_seed(rank + i), dtype=torch.float32), dim=1).requires_grad_() for i in (0, 10))
    with Largest() as seen: siglip(v, t, 10., block=8, group=group).backward()
    assert seen.numel <= max(64 * 4 * 4, 8 * 64), seen.numel                 # rows travel as bytes: four for each number


CHECKS = {f.__name__: f for f in (check_gather_dtypes, check_gather_backward, check_total, check_ids, check_refusals, check_ring, check_small_groups, check_memory)}


# The processes ------------------------------------------------------------------------------------------------------------------------------------

def worker(folder, rank, world):
    "Run every case and check; leave what came out in the folder, errors as text."
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder/'store'), world)
    dist.init_process_group('gloo', store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=30))
    group, out = dist.group.WORLD, {}
    jobs = {key: (run_case, case, counts, dtype, rank, group) for name, case in CASES.items() for key, counts, dtype, _ in runs(name, world)}
    jobs['wrong'] = run_case, own_rows_put_back, LAYOUTS[world]['uneven'], torch.float64, rank, group
    jobs |= {name: (check, group, rank, world) for name, check in CHECKS.items()}
    for i, (name, (job, *arguments)) in enumerate(jobs.items()):
        message = ''
        try: out[name] = job(*arguments)
        except Exception as e:
            message = f'{type(e).__name__}: {e}'
            out[name] = traceback.format_exc()
        store.set(f'{i}/{rank}', message)
        others = {store.get(f'{i}/{r}') for r in range(world)}                       # waits for them
        if len(others) > 1:                                                           # the processes are no longer in step
            out |= {n: f'not run: the processes fell out of step in {name}: {others}' for n in jobs if n not in out}
            break
    torch.save(out, folder/f'{rank}.pt')
    dist.destroy_process_group()                                                      # 'group' must be gone when the interpreter ends: all of it is local


def run_world(world, folder, timeout=240):
    "What each of `world` processes found, in rank order."
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get('PYTHONPATH', '')]))
    if sys.platform == 'linux': environment.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    logs = [open(folder/f'{r}.log', 'w') for r in range(world)]
    processes = [subprocess.Popen([sys.executable, __file__, str(folder), str(r), str(world)], env=environment, stdout=log, stderr=log) for r, log in enumerate(logs)]
    try:
        until = time.monotonic() + timeout
        codes = [p.wait(timeout=max(1, until - time.monotonic())) for p in processes]
    finally:
        for p, log in zip(processes, logs): p.kill(); p.wait(); log.close()
    assert not any(codes), '\n'.join((folder/f'{r}.log').read_text()[-3000:] for r in range(world))
    return [torch.load(folder/f'{r}.pt', weights_only=True) for r in range(world)]


@pytest.fixture(scope='session')
def worlds(tmp_path_factory):
    "world size -> results of its processes; each world runs once a session."
    found = {}
    def get(world):
        if world not in found: found[world] = run_world(world, tmp_path_factory.mktemp(f'world{world}'))
        return found[world]
    return get


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='torch was built without gloo')
class TestProcesses:
    @pytest.mark.parametrize('world', LAYOUTS)
    @pytest.mark.parametrize('name', CASES)
    def test_equals_one_process(self, worlds, world, name):
        results = worlds(world)
        for key, counts, dtype, allowed in runs(name, world):
            found = [r[key] for r in results]
            for f in found:
                assert not isinstance(f, str), f
            wanted = run_case(CASES[name], counts, dtype)
            flat = lambda r: torch.cat([r[k].double().flatten() for k in wanted if k != 'loss'])
            for rank, f in enumerate(found):
                where = f'{key}, process {rank} of {world}'
                assert abs(f['loss'] - wanted['loss']) <= allowed * abs(wanted['loss']), f'{where}: loss {f["loss"]} instead of {wanted["loss"]}'
                difference = (flat(f) - flat(wanted)).norm() / flat(wanted).norm()
                assert difference <= allowed, f'{where}: gradients differ by {difference:.2g} of their norm: { {k: (f[k].norm() / wanted[k].norm()).item() for k in wanted} }'

    @pytest.mark.parametrize('world', LAYOUTS)
    def test_wrong_gradients_are_seen(self, worlds, world):
        "The comparison is not blind: without gradients in the gather the loss and the scale are right, and the towers get one part in `world`."
        wanted = run_case(own_rows_put_back, LAYOUTS[world]['uneven'], torch.float64)
        for found in (r['wrong'] for r in worlds(world)):
            for k in ('loss', 'log_logit_scale'): torch.testing.assert_close(found[k], wanted[k])
            for k in ('image.weight', 'text.weight'): torch.testing.assert_close(found[k], wanted[k] / world)

    @pytest.mark.parametrize('world', LAYOUTS)
    @pytest.mark.parametrize('name', CHECKS)
    def test_operations(self, worlds, world, name):
        for rank, result in enumerate(worlds(world)): assert result[name] is None, f'process {rank}: {result[name]}'


@pytest.mark.parametrize('scale, bias', [(1., 0.), (10., -10.), (100., -30.)])
def test_siglip_equals_open_clip(scale, bias):
    "Loss and all gradients equal those of open_clip's SigLipLoss."
    if not hasattr(torch.ops.torchvision, 'nms'):        # beside torch's CPU build torchvision's own are missing, and its import asks for them
        operations = torch.library.Library('torchvision', 'FRAGMENT')
        for name in ('nms', 'qnms'): operations.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    from open_clip.loss import SigLipLoss
    from vlwb.losses.siglip import siglip
    g = torch.Generator().manual_seed(0)
    inputs = *(F.normalize(torch.randn(37, 16, generator=g), dim=1).requires_grad_() for _ in range(2)), *(torch.tensor(x, requires_grad=True) for x in (scale, bias))
    theirs, ours = SigLipLoss()(*inputs), siglip(*inputs[:3], logit_bias=inputs[3], block=16)
    assert abs(ours - theirs) <= 1e-6 * theirs
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)): assert (a - b).norm() <= 1e-6 * b.norm()


if __name__ == '__main__': worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
