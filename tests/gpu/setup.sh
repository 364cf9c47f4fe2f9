# Sourced on a machine with GPUs and no network, from the repository root: finds or unpacks what the suite needs.
# WHEELS: a folder with nixl.tar.xz (nixl_cu13 1.5.1 in s15, 1.4.1 with nixl_ep in s14) and ucx.tar.xz (headers).
export SITE=/tmp/site UCX=/tmp/ucx
if [ ! -d $SITE/s15 ]; then
  mkdir -p $SITE $UCX
  tar xf "$WHEELS/nixl.tar.xz" -C $SITE
  tar xf "$WHEELS/ucx.tar.xz" -C $UCX
fi
export PYTHONPATH=$PWD:$SITE/s15 PYTHONUNBUFFERED=1
export JAX_NIXLEP_TEST_UPSTREAM=$SITE/s14  # the nixl_ep whose build is for the torch that is here
