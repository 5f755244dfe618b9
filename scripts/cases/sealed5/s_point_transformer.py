"""Point Transformer (vector attention over given neighbours, one level of pooling), ported to a function of params."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

BATCH, POINTS, COARSE, K_FINE, K_DOWN, K_COARSE, K_UP = 2, 11, 5, 4, 6, 3, 3
C_IN, PLANES, WIDE, SHARE, CLASSES = 5, 8, 12, 2, 7


# ---- PyTorch
def grouping(x, idx):
    """x: (b, n, c), idx: (b, m, k) -> (b, m, k, c)"""
    b = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1)
    return x[b, idx]


def gather(x, idx):
    return torch.gather(x, 1, idx.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class PointTransformerLayer(nn.Module):
    def __init__(self, in_planes, out_planes, share_planes=SHARE):
        super().__init__()
        self.share_planes = share_planes
        mid_planes = out_planes
        self.linear_q = nn.Linear(in_planes, mid_planes)
        self.linear_k = nn.Linear(in_planes, mid_planes)
        self.linear_v = nn.Linear(in_planes, out_planes)
        self.linear_p = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, out_planes))
        self.linear_w = nn.Sequential(nn.LayerNorm(mid_planes), nn.ReLU(),
                                      nn.Linear(mid_planes, out_planes // share_planes),
                                      nn.LayerNorm(out_planes // share_planes), nn.ReLU(),
                                      nn.Linear(out_planes // share_planes, out_planes // share_planes))
        self.softmax = nn.Softmax(dim=2)

    def forward(self, p, x, idx):
        x_q, x_k, x_v = self.linear_q(x), self.linear_k(x), self.linear_v(x)
        p_r = grouping(p, idx) - p.unsqueeze(2)
        x_k, x_v = grouping(x_k, idx), grouping(x_v, idx)
        p_r = self.linear_p(p_r)
        w = x_k - x_q.unsqueeze(2) + p_r
        w = self.softmax(self.linear_w(w))
        b, n, k, c = x_v.shape
        s = self.share_planes
        x = ((x_v + p_r).view(b, n, k, s, c // s) * w.unsqueeze(3)).sum(2)
        return x.reshape(b, n, c)


class TransitionDown(nn.Module):
    def __init__(self, in_planes, out_planes):
        super().__init__()
        self.linear = nn.Linear(3 + in_planes, out_planes, bias=False)
        self.norm = nn.LayerNorm(out_planes)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, p, x, fps_idx, knn_idx):
        n_p = gather(p, fps_idx)
        g = torch.cat((grouping(p, knn_idx) - n_p.unsqueeze(2), grouping(x, knn_idx)), -1)
        g = self.relu(self.norm(self.linear(g)))
        return n_p, g.max(dim=2)[0]


class TransitionUp(nn.Module):
    def __init__(self, in_planes, out_planes):
        super().__init__()
        self.linear1 = nn.Sequential(nn.Linear(out_planes, out_planes), nn.LayerNorm(out_planes), nn.ReLU(inplace=True))
        self.linear2 = nn.Sequential(nn.Linear(in_planes, out_planes), nn.LayerNorm(out_planes), nn.ReLU(inplace=True))

    def forward(self, p1, x1, p2, x2, idx):
        x2 = self.linear2(x2)
        with torch.no_grad():
            dist = ((p1.unsqueeze(2) - grouping(p2, idx)) ** 2).sum(-1)
            dist_recip = 1.0 / (dist + 1e-8)
            weight = dist_recip / dist_recip.sum(2, keepdim=True)
        return self.linear1(x1) + (grouping(x2, idx) * weight.unsqueeze(-1)).sum(2)


class PointTransformerBlock(nn.Module):
    def __init__(self, planes):
        super().__init__()
        self.linear1 = nn.Linear(planes, planes, bias=False)
        self.bn1 = nn.LayerNorm(planes)
        self.transformer2 = PointTransformerLayer(planes, planes)
        self.bn2 = nn.LayerNorm(planes)
        self.linear3 = nn.Linear(planes, planes, bias=False)
        self.bn3 = nn.LayerNorm(planes)
        self.relu = nn.ReLU()

    def forward(self, p, x, idx):
        identity = x
        x = self.relu(self.bn1(self.linear1(x)))
        x = self.relu(self.bn2(self.transformer2(p, x, idx)))
        x = self.bn3(self.linear3(x))
        return self.relu(x + identity)


class PointTransformerSeg(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3 + C_IN, PLANES, bias=False), nn.LayerNorm(PLANES), nn.ReLU())
        self.enc1 = PointTransformerBlock(PLANES)
        self.down = TransitionDown(PLANES, WIDE)
        self.enc2 = PointTransformerBlock(WIDE)
        self.up = TransitionUp(WIDE, PLANES)
        self.dec1 = PointTransformerBlock(PLANES)
        self.cls = nn.Sequential(nn.Linear(PLANES, PLANES), nn.LayerNorm(PLANES), nn.ReLU(), nn.Linear(PLANES, CLASSES))

    def forward(self, pos, feat, knn_fine, fps, knn_down, knn_coarse, knn_up):
        x1 = self.enc1(pos, self.stem(torch.cat((pos, feat), -1)), knn_fine)
        p2, x2 = self.down(pos, x1, fps, knn_down)
        x2 = self.enc2(p2, x2, knn_coarse)
        x1 = self.dec1(pos, self.up(pos, x1, p2, x2, knn_up), knn_fine)
        return self.cls(x1)


# ---- Flax
# One cloud at a time; `segment` maps over the batch.
def dense(p, x):
    y = jnp.tensordot(x, p['w'], axes=1)
    return y + p['b'] if 'b' in p else y


def norm(p, x, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return p['g'] * centred * jax.lax.rsqrt(jnp.mean(centred ** 2, -1, keepdims=True) + eps) + p['b']


def dense_norm_relu(p, x):
    return jax.nn.relu(norm(p['ln'], dense(p['fc'], x)))


def vector_attention(p, xyz, h, near):
    q, k, v = jnp.split(dense(p['qkv'], h), 3, axis=-1)
    rel = xyz[near] - xyz[:, None]
    rel = dense(p['pos_out'], dense_norm_relu(p['pos_in'], rel))
    score = k[near] - q[:, None] + rel
    score = jax.nn.relu(norm(p['ln_score'], score))
    score = dense(p['score_out'], dense_norm_relu(p['score_in'], score))
    share = jax.nn.softmax(score, axis=1)                     # (points, neighbours, group)
    value = v[near] + rel
    value = value.reshape(*value.shape[:-1], -1, share.shape[-1])
    mixed = jnp.einsum('nksg,nkg->nsg', value, share)
    return mixed.reshape(mixed.shape[0], -1)


def block(p, xyz, h, near):
    y = dense_norm_relu(p['first'], h)
    y = jax.nn.relu(norm(p['ln_att'], vector_attention(p['att'], xyz, y, near)))
    y = norm(p['last']['ln'], dense(p['last']['fc'], y))
    return jax.nn.relu(h + y)


def pool(p, xyz, h, centres, near):
    """Neighbours' relative positions and features through a layer, the largest of each channel."""
    local = jnp.concatenate([xyz[near] - xyz[centres][:, None], h[near]], axis=-1)
    return xyz[centres], dense_norm_relu(p, local).max(axis=1)


def unpool(p, xyz, h, xyz_coarse, h_coarse, near):
    lifted = dense_norm_relu(p['coarse'], h_coarse)
    gap = jnp.sum((xyz[:, None] - xyz_coarse[near]) ** 2, axis=-1)
    closeness = jax.lax.stop_gradient(1 / (gap + 1e-8))
    closeness = closeness / closeness.sum(axis=1, keepdims=True)
    return dense_norm_relu(p['skip'], h) + jnp.einsum('nk,nkc->nc', closeness, lifted[near])


def segment_cloud(p, xyz, feat, near1, centres, near_down, near2, near_up):
    fine = dense_norm_relu(p['stem'], jnp.concatenate([xyz, feat], axis=-1))
    fine = block(p['block_fine'], xyz, fine, near1)
    xyz2, coarse = pool(p['pool'], xyz, fine, centres, near_down)
    coarse = block(p['block_coarse'], xyz2, coarse, near2)
    fine = unpool(p['unpool'], xyz, fine, xyz2, coarse, near_up)
    fine = block(p['block_out'], xyz, fine, near1)
    return dense(p['head_out'], dense_norm_relu(p['head_in'], fine))


def segment(params, *clouds):
    return jax.vmap(lambda *one: segment_cloud(params, *one))(*clouds)


def port_weights(net):
    arr = lambda t: jnp.asarray(t.detach().numpy())

    def fc(*linears):
        out = {'w': jnp.concatenate([arr(l.weight).T for l in linears], axis=1)}
        if linears[0].bias is not None:
            out['b'] = jnp.concatenate([arr(l.bias) for l in linears])
        return out

    def ln(n):
        return {'g': arr(n.weight), 'b': arr(n.bias)}

    def both(linear, n):
        return {'fc': fc(linear), 'ln': ln(n)}

    def port_block(b):
        t = b.transformer2
        att = {'qkv': fc(t.linear_q, t.linear_k, t.linear_v),
               'pos_in': both(t.linear_p[0], t.linear_p[1]), 'pos_out': fc(t.linear_p[3]),
               'ln_score': ln(t.linear_w[0]), 'score_in': both(t.linear_w[2], t.linear_w[3]),
               'score_out': fc(t.linear_w[5])}
        return {'first': both(b.linear1, b.bn1), 'att': att, 'ln_att': ln(b.bn2), 'last': both(b.linear3, b.bn3)}

    params = {'stem': both(net.stem[0], net.stem[1]), 'block_fine': port_block(net.enc1),
              'pool': both(net.down.linear, net.down.norm), 'block_coarse': port_block(net.enc2),
              'unpool': {'skip': both(net.up.linear1[0], net.up.linear1[1]),
                         'coarse': both(net.up.linear2[0], net.up.linear2[1])},
              'block_out': port_block(net.dec1),
              'head_in': both(net.cls[0], net.cls[1]), 'head_out': fc(net.cls[3])}
    return segment, params


def nearest(queries, points, k):
    gap = ((queries[:, :, None] - points[:, None]) ** 2).sum(-1)
    return np.argsort(gap, axis=-1)[..., :k]


def farthest(points, m):
    out = []
    for cloud in points:
        chosen, gap = [0], np.full(len(cloud), np.inf)
        while len(chosen) < m:
            gap = np.minimum(gap, ((cloud - cloud[chosen[-1]]) ** 2).sum(-1))
            chosen.append(int(gap.argmax()))
        out.append(chosen)
    return np.asarray(out)


def build(seed):
    torch.manual_seed(seed)
    net = PointTransformerSeg()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3 * torch.randn_like(p))
        for m in net.modules():
            if isinstance(m, nn.LayerNorm):
                m.weight.add_(1.1)
            if isinstance(m, PointTransformerLayer):
                m.linear_q.weight.mul_(2.5), m.linear_k.weight.mul_(2.5)
                m.linear_w[2].weight.mul_(2), m.linear_w[3].bias.mul_(0.3)
    net.eval()
    r = np.random.RandomState(seed)
    pos = r.randn(BATCH, POINTS, 3).astype(np.float32)
    fps = farthest(pos, COARSE)
    coarse = np.take_along_axis(pos, fps[..., None], axis=1)
    inputs = {'pos': pos, 'feat': r.randn(BATCH, POINTS, C_IN).astype(np.float32),
              'knn_fine': nearest(pos, pos, K_FINE), 'fps': fps, 'knn_down': nearest(coarse, pos, K_DOWN),
              'knn_coarse': nearest(coarse, coarse, K_COARSE), 'knn_up': nearest(pos, coarse, K_UP)}
    return {'torch': net, 'flax': port_weights(net), 'inputs': inputs, 'flax_inputs': tuple(inputs.values())}


FAULTS = [
    {'title': 'the attention weights are normalised over the groups of channels, not over the neighbours',
     'edits': [('share = jax.nn.softmax(score, axis=1) ', 'share = jax.nn.softmax(score, axis=2) ')],
     'layers': ['enc1.transformer2.softmax', 'enc1.transformer2'],
     'between': ('enc1.transformer2.linear_w', 'enc1.bn2'),
     'causes': ['softmax_axis', 'axis'], 'level': 'outputs'},
    {'title': 'the relative position is the centre less the neighbour, not the neighbour less the centre',
     'edits': [('rel = xyz[near] - xyz[:, None]', 'rel = xyz[:, None] - xyz[near]')],
     'layers': ['enc1.transformer2', 'enc1.transformer2.linear_p', 'enc1.transformer2.linear_p.0'],
     'between': ('enc1.transformer2.linear_v', 'enc1.transformer2.linear_p.0'),
     'causes': ['operand', 'swapped', 'scale'], 'level': 'outputs'},
    {'title': 'the values are split into groups with the group axis before the shared axis',
     'edits': [('value = value.reshape(*value.shape[:-1], -1, share.shape[-1])', 'value = value.reshape(*value.shape[:-1], share.shape[-1], -1)'),
               ("jnp.einsum('nksg,nkg->nsg', value, share)", "jnp.einsum('nkgs,nkg->ngs', value, share)")],
     'layers': ['enc1.transformer2'],
     'between': ('enc1.transformer2.softmax', 'enc1.bn2'),
     'causes': ['rearranged', 'heads'], 'level': 'outputs'},
    {'title': 'the pooled neighbourhood keeps absolute positions: the centre is not subtracted',
     'edits': [('local = jnp.concatenate([xyz[near] - xyz[centres][:, None], h[near]], axis=-1)',
                'local = jnp.concatenate([xyz[near], h[near]], axis=-1)')],
     'layers': ['down', 'down.linear'],
     'between': ('enc1', 'down.linear'),
     'causes': ['left_out', 'residual'], 'level': 'outputs'},
    {'title': 'gradients flow into the positions through the interpolation weights, which torch computes under no_grad',
     'edits': [('closeness = jax.lax.stop_gradient(1 / (gap + 1e-8))', 'closeness = 1 / (gap + 1e-8)')],
     'layers': ['up'], 'between': None, 'causes': ['stop_gradient'], 'level': 'gradients'},
]
