# Shared virtual addressing: the page request interface with few requests outstanding, with many, with none.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" requests
guest sva requests >&3
