# Sourced from the repository root. Without a network: finds or unpacks what the suite needs from WHEELS, a folder with
# nixl.tar.xz (nixl_cu13 1.5.1 in s15, 1.4.1 with nixl_ep in s14) and ucx.tar.xz (headers); our modules are then in
# jax_nixlep/. Else all is installed.
export PYTHONUNBUFFERED=1
if [ -n "$WHEELS" ]; then
  SITE=/tmp/site UCX_INCLUDE=/tmp/ucx/include
  if [ ! -d $SITE/s15 ]; then
    mkdir -p $SITE /tmp/ucx
    tar xf "$WHEELS/nixl.tar.xz" -C $SITE
    tar xf "$WHEELS/ucx.tar.xz" -C /tmp/ucx
  fi
  export PYTHONPATH=$PWD:$SITE/s15
  export JAX_NIXLEP_TEST_UPSTREAM=$SITE/s14  # the nixl_ep whose build is for the torch that is here
fi
