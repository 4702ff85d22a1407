# Shared virtual addressing: how long things take in this guest.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" timings
guest sva timings >&3
