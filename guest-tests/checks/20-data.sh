# Random data through the disk and back, and the same data in the host's backing store.
. /lib.sh
bytes=$((DATA_MIB * MIB))
need_disk $bytes read-back host-copy
plan 2

text=$(guest bulk "$DISK" 0 $bytes)
status=$?
outcome $status read-back "$text"
if [ $status -ne 0 ]; then
	skip host-copy "nothing to compare"
	finish
fi
sha256=${text#sha256=}
sha256=${sha256%% *}
fact data_sha256 "$sha256"
ask data-written nvme="$NVME" offset=0 length=$bytes sha256="$sha256"
outcome $? host-copy "$(field text)"
finish
