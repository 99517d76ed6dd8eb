# Installs Debian packages without starting any service, now or at the next boot, and without making a PostgreSQL
# cluster. What keeps them from it stands only while this runs; an interrupted run is tidied up by the next, which
# may have nothing to install.
set -eu
policy=/usr/sbin/policy-rc.d
saved=$policy.before-systemprompt-cloud
cluster=/etc/postgresql-common/createcluster.d/systemprompt-cloud.conf
units=/etc/systemd/system
ours='# systemprompt-cloud: nothing starts while packages are installed'

is_ours() { [ -e "$policy" ] && grep -qxF "$ours" "$policy"; }
restore() {
    rm -f "$cluster"
    rmdir --ignore-fail-on-non-empty "${cluster%/*}" 2>/dev/null || true
    if is_ours; then rm -f "$policy"; fi
    if [ -e "$saved" ]; then mv -f "$saved" "$policy"; fi
}
enabled() { find "$units" -type l -path '*.wants/*' -printf '%f\n' 2>/dev/null | sort -u; }
# What came with the packages would start at the next boot.
disable_new() {
    # Without systemd nothing is started at a boot by these links.
    command -v systemctl >/dev/null || return 0
    for unit in $(enabled); do
        printf '%s\n' "$before" | grep -qxF "$unit" || systemctl disable --quiet "$unit" || true
    done
}
finish() {
    restore
    disable_new
}

# One at a time: two would take each other's precautions away.
exec 9<"${policy%/*}"
flock 9
before=$(enabled)
trap finish EXIT
trap 'exit 130' INT TERM HUP

restore
set -- PACKAGES
[ $# -gt 0 ] || exit 0
mkdir -p "${cluster%/*}"
echo 'create_main_cluster = false' >"$cluster"
if [ -e "$policy" ]; then mv "$policy" "$saved"; fi
printf '#!/bin/sh\n%s\nexit 101\n' "$ours" >"$policy"
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive
# Somebody else's apt, such as the nightly upgrade, is waited for.
apt-get -o DPkg::Lock::Timeout=300 update
apt-get -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends "$@"
