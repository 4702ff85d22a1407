# Shared virtual addressing: mappings that change beneath translations that the device has.
. /lib.sh
[ -c /dev/vioasid-dma0 ] || skip_all "no DMA engine in this machine" changes
guest sva changes >&3
