# Shared virtual addressing: rings in the memory of processes, doorbell pages mapped into them.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" ring
guest sva ring >&3
