# Shared virtual addressing: what a process may not do, its device may not do.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" errors
guest sva errors >&3
