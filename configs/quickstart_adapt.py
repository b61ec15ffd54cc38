"""placeholder"""
from configs import common, quickstart_ar


def get_config(arg=None):
  c = quickstart_ar.get_config()
  c.objective.kind = "diffusion"
  c.objective.t_sampler = "stratified"
  if arg is None:
    c.objective.anneal_steps = 60
  return c
