# Shared virtual addressing: several processes, several endpoints.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" processes
guest sva processes >&3
