"""Reading compiled programs: loops, collectives and bytes, against texts and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffucoder_jax.runtime import collectives, hlo, sharding, traffic

# Cut from what libtpu 0.0.42 compiles for v5e and v5p, with shorter names: an asynchronous all-gather
# in its three parts, a reduce-scatter as a fusion, a windowed product whose counter goes up by two.
TPU = """\
HloModule jit_step, is_scheduled=true

%start (p: bf16[1,112,64]) -> (bf16[1,112,64], bf16[1,3584,64], u32[]) {
  %p = bf16[1,112,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %ag.0 = bf16[1,3584,64]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=59, replica_groups=mesh['axis_0'=32,'axis_1'=1,'axis_2'=8], device_ids=([8,32]T(1,0)) {'axis_0'}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="11"}
  ROOT %cc.0 = (bf16[1,112,64]{2,1,0:S(1)}, bf16[1,3584,64]{2,1,0}, u32[]{:S(2)}) custom-call(%ag.0), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[1,112,64], p.2: bf16[1,3584,64], q: f32[8,128]) -> (f32[8,128], bf16[1,112,64], bf16[1,3584,64], bf16[1,3584,64]) {
  %p.1 = bf16[1,112,64]{2,1,0:S(1)} parameter(0)
  %p.2 = bf16[1,3584,64]{2,1,0} parameter(1)
  %q = f32[8,128]{1,0:T(8,128)} parameter(2)
  %twice = f32[8,128]{1,0:T(8,128)} add(%q, %q)
  %ag.1 = bf16[1,3584,64]{2,1,0} all-gather(%p.1), channel_id=59, replica_groups=mesh['axis_0'=32,'axis_1'=1,'axis_2'=8], device_ids=([8,32]T(1,0)) {'axis_0'}, dimensions={1}, frontend_attributes={chain_id="11"}
  ROOT %t.1 = (f32[8,128]{1,0}, bf16[1,112,64]{2,1,0:S(1)}, bf16[1,3584,64]{2,1,0}, bf16[1,3584,64]{2,1,0}) tuple(%twice, %p.1, %p.2, %ag.1)
}

%done (p.3: bf16[1,112,64], p.4: bf16[1,3584,64]) -> bf16[1,3584,64] {
  %p.3 = bf16[1,112,64]{2,1,0:S(1)} parameter(0)
  %p.4 = bf16[1,3584,64]{2,1,0} parameter(1)
  %ag.2 = bf16[1,3584,64]{2,1,0} all-gather(%p.3), channel_id=59, replica_groups=mesh['axis_0'=32,'axis_1'=1,'axis_2'=8], device_ids=([8,32]T(1,0)) {'axis_0'}, dimensions={1}, frontend_attributes={chain_id="11"}
  ROOT %cc.1 = bf16[1,3584,64]{2,1,0} custom-call(%p.3, %p.4, %ag.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.7 (g: bf16[3584,512], h: bf16[3584,512]) -> (bf16[112,512], bf16[112,512]) {
  %g = bf16[3584,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %h = bf16[3584,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %ar = (bf16[3584,512]{1,0}, bf16[3584,512]{1,0}) all-reduce(%g, %h), channel_id=1, replica_groups=[8,32]<=[256], use_global_device_ids=true, to_apply=%sum
  %g.1 = bf16[3584,512]{1,0} get-tuple-element(%ar), index=0
  %c.0 = u32[] constant(0)
  %ds.0 = bf16[112,512]{1,0:S(1)} dynamic-slice(%g.1, %c.0, %c.0), dynamic_slice_sizes={112,512}
  %g.2 = bf16[3584,512]{1,0} get-tuple-element(%ar), index=1
  %ds.1 = bf16[112,512]{1,0:S(1)} dynamic-slice(%g.2, %c.0, %c.0), dynamic_slice_sizes={112,512}
  ROOT %t.2 = (bf16[112,512]{1,0:S(1)}, bf16[112,512]{1,0:S(1)}) tuple(%ds.0, %ds.1)
}

%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %add = bf16[] add(%x, %y)
}

%window (w: (bf16[112,64], u32[])) -> (bf16[112,64], u32[]) {
  %w = (bf16[112,64]{1,0}, u32[]{:T(128)}) parameter(0)
  %w.0 = bf16[112,64]{1,0} get-tuple-element(%w), index=0
  %cps = (bf16[112,64]{1,0}, bf16[112,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w.0), channel_id=4, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %cpd = bf16[112,64]{1,0} collective-permute-done(%cps)
  %w.1 = u32[]{:T(128)} get-tuple-element(%w), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%w.1, %two)
  ROOT %w.2 = (bf16[112,64]{1,0}, u32[]{:T(128)}) tuple(%cpd, %next)
}

%window_cond (v: (bf16[112,64], u32[])) -> pred[] {
  %v = (bf16[112,64]{1,0}, u32[]{:T(128)}) parameter(0)
  %v.1 = u32[]{:T(128)} get-tuple-element(%v), index=1
  %sixteen = u32[]{:T(128)} constant(16)
  ROOT %less = pred[]{:T(512)} compare(%v.1, %sixteen), direction=LT
}

%layer (l: (s32[], bf16[112,64], f32[8,128], s32[])) -> (s32[], bf16[112,64], f32[8,128], s32[]) {
  %l = (s32[]{:T(128)}, bf16[112,64]{1,0}, f32[8,128]{1,0}, s32[]) parameter(0)
  %l.0 = s32[]{:T(128)} get-tuple-element(%l), index=0
  %l.1 = bf16[112,64]{1,0} get-tuple-element(%l), index=1
  %l.2 = f32[8,128]{1,0} get-tuple-element(%l), index=2
  %l.3 = s32[] get-tuple-element(%l), index=3
  %shard = bf16[1,112,64]{2,1,0:S(1)} copy(%l.1)
  %acs = (bf16[1,112,64]{2,1,0:S(1)}, bf16[1,3584,64]{2,1,0}, u32[]{:S(2)}) fusion(%shard), kind=kCustom, calls=%start
  %gathered = bf16[1,3584,64]{2,1,0} get-tuple-element(%acs), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/attend"}
  %both = (f32[8,128]{1,0}, bf16[1,112,64]{2,1,0:S(1)}, bf16[1,3584,64]{2,1,0}, bf16[1,3584,64]{2,1,0}) fusion(%shard, %gathered, %l.2), kind=kOutput, calls=%beside
  %going = bf16[1,3584,64]{2,1,0} get-tuple-element(%both), index=2
  %whole = bf16[1,3584,64]{2,1,0} fusion(%shard, %going), kind=kCustom, calls=%done
  %l.4 = f32[8,128]{1,0} get-tuple-element(%both), index=0
  %zero = u32[]{:T(128)} constant(0)
  %wt = (bf16[112,64]{1,0}, u32[]{:T(128)}) tuple(%l.1, %zero)
  %loop.1 = (bf16[112,64]{1,0}, u32[]{:T(128)}) while(%wt), condition=%window_cond, body=%window, metadata={op_name="jit(step)/layers/mlp/dot_general"}
  %l.5 = bf16[112,64]{1,0} get-tuple-element(%loop.1), index=0
  %big = bf16[3584,512]{1,0:S(1)} constant({...})
  %rs = (bf16[112,512]{1,0:S(1)}, bf16[112,512]{1,0:S(1)}) fusion(%big, %big), kind=kCustom, calls=%all-reduce-scatter.7
  %one = s32[]{:T(128)} constant(1)
  %l.6 = s32[]{:T(128)} add(%l.0, %one)
  ROOT %l.7 = (s32[]{:T(128)}, bf16[112,64]{1,0}, f32[8,128]{1,0}, s32[]) tuple(%l.6, %l.5, %l.4, %l.3)
}

%layer_cond (m: (s32[], bf16[112,64], f32[8,128], s32[])) -> pred[] {
  %m = (s32[]{:T(128)}, bf16[112,64]{1,0}, f32[8,128]{1,0}, s32[]) parameter(0)
  %m.0 = s32[]{:T(128)} get-tuple-element(%m), index=0
  %m.3 = s32[] get-tuple-element(%m), index=3
  ROOT %less.1 = pred[]{:T(512)} compare(%m.0, %m.3), direction=LT
}

ENTRY %main (a: bf16[112,64], b: f32[8,128]) -> f32[8,128] {
  %a = bf16[112,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %begin = s32[]{:T(128)} constant(0)
  %layers = s32[] constant(28)
  %lt = (s32[]{:T(128)}, bf16[112,64]{1,0}, f32[8,128]{1,0}, s32[]) tuple(%begin, %a, %b, /*index=3*/%layers)
  %loop.0 = (s32[]{:T(128)}, bf16[112,64]{1,0}, f32[8,128]{1,0}, s32[]) while(%lt), condition=%layer_cond, body=%layer
  %token = token[] after-all()
  %sent = (bf16[112,64]{1,0}, u32[], token[]) send(%a, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%loop.0), index=2
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def tpu():
  module = hlo.parse(TPU)
  return module, hlo.count_runs(module)


def test_loops_run_as_often_as_the_program_says(tpu):
  """A limit that the loop carries along (28), and a counter in steps of two (16 / 2)."""
  module, runs = tpu
  assert runs.loops == {"loop.0": 28, "loop.1": 8}
  assert not runs.assumed
  assert (runs.times["main"], runs.times["layer"], runs.times["window"]) == (1, 28, 28 * 8)
  assert runs.times["all-reduce-scatter.7"] == 28
  layer = module.computations["layer"]
  assert module.entry == "main" and layer.root == "l.7"
  assert layer.instructions["gathered"].op_name == "jit(step)/attend", "written over several lines"


def test_collectives_of_a_tpu_program(tpu):
  module, runs = tpu
  found = collectives.find(module, runs, 256)
  by_kind = {one.kind: one for one in found}
  assert len(found) == len(by_kind) == 4, "the all-gather's later parts are the same one"
  gather, scatter = by_kind["all-gather"], by_kind["reduce-scatter"]
  assert (gather.bytes, gather.times, gather.group_size) == (3584 * 64 * 2, 28, 32)
  # Device ids [8, 32] transposed: groups of 32 that stand in one row of the mesh.
  assert gather.groups[:2] == (tuple(range(32)), tuple(range(32, 64)))
  assert (scatter.bytes, scatter.times) == (2 * 3584 * 512 * 2, 28)
  assert scatter.groups[1] == tuple(range(32, 64))
  permute = by_kind["collective-permute"]
  assert (permute.bytes, permute.times) == (112 * 64 * 2, 28 * 8)
  assert permute.groups == ((0, 1), (1, 2), (2, 3), (3, 0))
  between = by_kind["all-reduce"]
  assert (between.bytes, between.groups, between.times) == (112 * 64 * 2, (), 1)


def test_hbm_bytes_of_a_tpu_program(tpu):
  """What stands in VMEM is free, whatever a fusion passes on is not moved, loops multiply."""
  module, runs = tpu
  copied = 112 * 64 * 2  # read from HBM into VMEM
  gathered = 3584 * 64 * 2  # written once, though three fusions have it among their results
  added = 2 * 8 * 128 * 4
  window = 2 * 112 * 64 * 2
  assert traffic.instruction_bytes(
    module, module.computations["layer"], module.computations["layer"].instructions["shard"]
  ) == copied  # fmt: skip
  scalars = traffic.hbm_bytes(module, runs) - 28 * (copied + gathered + added + 8 * window)
  sent = 2 * 112 * 64 * 2
  assert 0 <= scalars - sent < 28 * 500, "counters and comparisons"


def test_groups_are_read_in_all_forms():
  wanted = ((0, 4), (1, 5), (2, 6), (3, 7))
  for text in (
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}",
    "replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
    "replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}",
    "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'b','c'}, dimensions={0}",
  ):
    assert collectives.replica_groups(text, 8) == wanted, text
  assert collectives.replica_groups("replica_groups={}, dimensions={0}", 4) == ((0, 1, 2, 3),)
  with pytest.raises(ValueError, match="unknown form"):
    collectives.replica_groups("replica_groups=something", 4)


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("hello")
  with pytest.raises(ValueError, match="unknown element type 'q7'"):
    hlo.arrays("q7[3,4]{1,0}")
  assert hlo.arrays("(bf16[2,3]{1,0:T(8,128)S(1)}, pred[])") == (
    hlo.Array("bf16", (2, 3), 1), hlo.Array("pred", (), 0)
  )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Programs compiled here, for eight fake devices


@functools.cache
def compiled():
  """Each collective in a scan of five rounds, over an axis of four or of two."""
  mesh = sharding.make_mesh(dict(data=2, fsdp=4, tensor=1))
  rows, rounds = 1024, 5

  def local(x, w):
    def body(x, _):
      whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
      x = jnp.sin(x) * whole.sum()
      part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
      x = x + jax.lax.psum(part.sum() * x, "data")
      return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), None

    x = jax.lax.scan(body, x, None, length=rounds)[0]
    return jax.lax.all_to_all(x, "data", 0, 0, tiled=True)

  batch = PartitionSpec(("data", "fsdp"))
  fn = jax.shard_map(
    local, mesh=mesh, in_specs=(batch, PartitionSpec("fsdp")), out_specs=batch, check_vma=False
  )
  args = [
    jax.ShapeDtypeStruct((n, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
    for n, spec in ((8 * rows, batch), (4 * 48, PartitionSpec("fsdp")))
  ]
  text = jax.jit(fn).lower(*args).compile().as_text()
  return hlo.parse(text), rows * 16 * 4, rounds


def test_collective_bytes_equal_the_closed_form():
  module, block, rounds = compiled()
  runs = hlo.count_runs(module)
  assert rounds in runs.loops.values() and not runs.assumed
  found = collectives.find(module, runs, 8)
  total = {}
  for one in found:
    key = one.kind, one.group_size
    total[key] = total.get(key, 0.0) + one.times * one.bytes
  wanted = {
    ("all-gather", 4): 1 * 4 * 48 * 16 * 4,  # it does not depend on the round: XLA moves it out
    ("reduce-scatter", 4): rounds * block,
    ("all-reduce", 2): rounds * block,
    ("collective-permute", 2): rounds * block,
    ("all-to-all", 2): block,
  }
  in_loop = {("all-gather", 4): rounds * 4 * 48 * 16 * 4}
  assert total in (wanted, {**wanted, **in_loop})


def test_a_loop_whose_limit_is_computed_needs_a_hint():
  @jax.jit
  def fn(x, n):
    return jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x) + i, x)

  text = fn.lower(np.ones(8, np.float32), np.int32(3)).compile().as_text()
  module = hlo.parse(text)
  runs = hlo.count_runs(module)
  assert list(runs.loops.values()) == [1] and "counted once" in runs.assumed[0]
  runs = hlo.count_runs(module, [hlo.Hint("elsewhere", 3, ""), hlo.Hint("while", 7, "as I say")])
  assert list(runs.loops.values()) == [7] and "7 rounds assumed, as I say" in runs.assumed[0]


def test_nested_loops_and_early_stops_multiply():
  """The sampler's form: a limit and a condition on the data; inside, a scan."""

  @jax.jit
  def fn(x):
    def body(carry):
      i, x = carry
      return i + 1, jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, None, length=3)[0]

    return jax.lax.while_loop(lambda carry: (carry[0] < 6) & (carry[1].sum() > 0), body, (0, x))

  module = hlo.parse(fn.lower(np.ones(8, np.float32)).compile().as_text())
  runs = hlo.count_runs(module)
  assert sorted(runs.loops.values()) == [3, 6] and not runs.assumed


def test_slices_of_a_stack_count_as_slices():
  """A scan over layers reads each layer's weights once, not the whole stack in every round."""
  layers, width = 8, 128

  @jax.jit
  def fn(w_NDD, x_D):
    return jax.lax.scan(lambda x, w: (jnp.tanh(w @ x), None), x_D, w_NDD)[0]

  shapes = (layers, width, width), (width,)
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  module = hlo.parse(fn.lower(*args).compile().as_text())
  moved = traffic.hbm_bytes(module, hlo.count_runs(module))
  weights = layers * width * width * 4
  assert weights <= moved < 4 * weights


def test_without_loops_bytes_are_what_xla_counts():
  @jax.jit
  def fn(x_BD, w_DF):
    return jnp.tanh(x_BD @ w_DF) @ w_DF.T

  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 256), (256, 512))]
  compiled = fn.lower(*args).compile()
  module = hlo.parse(compiled.as_text())
  moved = traffic.hbm_bytes(module, hlo.count_runs(module))
  assert moved == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.02)
