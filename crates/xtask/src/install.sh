# Installs Debian packages without starting any service, now or at the next boot, and without making a PostgreSQL cluster.
# What keeps them from it stands only while this runs; an interrupted run is tidied up by the next.
set -eu
policy=/usr/sbin/policy-rc.d
saved=$policy.before-systemprompt-cloud
cluster=/etc/postgresql-common/createcluster.d/systemprompt-cloud.conf
ours='# systemprompt-cloud: nothing starts while packages are installed'

is_ours() { [ -e "$policy" ] && grep -qxF "$ours" "$policy"; }
restore() {
    rm -f "$cluster"
    rmdir --ignore-fail-on-non-empty "${cluster%/*}" 2>/dev/null || true
    if is_ours; then rm -f "$policy"; fi
    if [ -e "$saved" ]; then mv -f "$saved" "$policy"; fi
}
trap restore EXIT
trap 'exit 130' INT TERM HUP

restore
mkdir -p "${cluster%/*}"
echo 'create_main_cluster = false' >"$cluster"
if [ -e "$policy" ]; then mv "$policy" "$saved"; fi
printf '#!/bin/sh\n%s\nexit 101\n' "$ours" >"$policy"
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends PACKAGES

# Postgres serves nothing without a cluster; these would.
for package in PACKAGES; do
    case $package in
        docker-registry) service=docker-registry ;;
        nginx-light) service=nginx ;;
        *) continue ;;
    esac
    if command -v systemctl >/dev/null; then systemctl --quiet disable "$service"; fi
done
