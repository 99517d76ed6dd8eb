//! Apps: what all instances of a tenant share, and what the installation keeps in order for all of them.

use super::{
    crash, image,
    instance::{Asker, Inner, group},
    launch::slot,
    layout::{private_directory, read_record, write_record},
    lock::FileLock,
    logs,
    machine::Machine,
    state::{AppRecord, InstanceRecord, Stage},
};
use crate::{AppHandle, AppSpec, DriverError};
use std::{collections::HashSet, io, os::unix::fs::chown};
use systemprompt_contract::AppName;
use systemprompt_oci::Digest;

impl Inner {
    pub(crate) fn ensure_app(&self, spec: &AppSpec) -> Result<AppHandle, DriverError> {
        let _app = FileLock::exclusive(&self.layout.app_lock(&spec.app))?;
        let path = self.layout.app_record(&spec.app);
        let record: AppRecord = match read_record::<AppRecord>(&path)? {
            Some(record) if record.tenant != spec.tenant => {
                return Err(DriverError::Conflict(format!("the app {} belongs to another tenant", spec.app)));
            }
            Some(record) => AppRecord { region: spec.region, memory_mb: spec.memory_mb, ..record },
            None => {
                private_directory(&self.layout.app(&spec.app))?;
                crash::point("compute.app.directory");
                let uid = self.networks.as_ref().map(|_| self.allocate_uid()).transpose()?;
                AppRecord { tenant: spec.tenant, region: spec.region, memory_mb: spec.memory_mb, uid }
            }
        };
        let storage = self.layout.storage(&spec.app);
        private_directory(&storage)?;
        if let Some(uid) = record.uid {
            chown(&storage, Some(uid), Some(uid))?;
        }
        crash::point("compute.app.storage");
        write_record(&path, &record)?;
        Ok(AppHandle::new(spec.app.as_str()))
    }

    pub(crate) fn destroy_app(&self, app: &AppName) -> Result<(), DriverError> {
        let lock = FileLock::exclusive(&self.layout.app_lock(app))?;
        for key in self.layout.list_instances(app)? {
            let lock = FileLock::exclusive(&self.layout.instance_lock(&key))?;
            super::stop::kill_now(self, &key)?;
            self.erase(&key, lock)?;
        }
        self.layout.discard(&self.layout.app(app))?;
        crash::point("compute.destroy.discarded");
        // An earlier call may have got no further than moving it there: deleted is what is deleted.
        self.layout.empty_trash(Some(app.as_str()))?;
        lock.remove()?;
        self.collect_images()?;
        if self.layout.list_apps()?.is_empty() {
            self.remove_rules()?;
        }
        Ok(())
    }

    /// Takes the installation's firewall rules away, and the control groups of all instances that have ended.
    pub(crate) fn remove_rules(&self) -> Result<(), DriverError> {
        let _installation = FileLock::exclusive(&self.layout.installation_lock())?;
        if let Some(networks) = &self.networks {
            networks.remove_rules()?;
        }
        if let Some(cgroups) = &self.cgroups {
            for key in self.keys()? {
                let found = self.look(&key, Asker::Bystander)?;
                if found.is_none_or(|found| matches!(found.stage, Stage::Exited(_)) && found.init.is_none()) {
                    cgroups.remove(&group(&key))?;
                }
            }
            cgroups.remove_installation();
        }
        Ok(())
    }

    /// Puts the firewall's rules back when somebody has flushed them while instances run.
    pub(crate) fn repair_rules(&self) -> Result<(), DriverError> {
        let Some(networks) = &self.networks else { return Ok(()) };
        // Against a shutdown that has just seen the last instance end.
        let _installation = FileLock::exclusive(&self.layout.installation_lock())?;
        for key in self.keys()? {
            match self.look(&key, Asker::Bystander) {
                Ok(Some(found)) if matches!(found.stage, Stage::Running { .. }) => return Ok(networks.repair_rules()?),
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, instance = %key.handle(), "it cannot be told whether it runs"),
            }
        }
        Ok(())
    }

    /// Trims outputs, syncs new images, empties the trash. What fails for one instance or image is tried again, and
    /// keeps nothing else from its turn.
    pub(crate) fn maintain(&self) -> Result<(), DriverError> {
        let mut images = HashSet::new();
        for key in self.keys()? {
            let files = self.layout.instance(&key);
            if let Err(error) = logs::trim(&files.output(), self.config.output_bytes) {
                tracing::warn!(%error, instance = %key.handle(), "the output could not be trimmed");
            }
            match read_record::<InstanceRecord>(&files.record()) {
                Ok(record) => images.extend(record.map(|record| record.image)),
                Err(error) => tracing::warn!(%error, instance = %key.handle(), "the record cannot be read"),
            }
        }
        for digest in images {
            if let Err(error) = image::sync(&self.layout, &digest) {
                tracing::warn!(%error, image = %digest, "the image could not be synced");
            }
        }
        Ok(self.layout.empty_trash(None)?)
    }

    pub(crate) fn app_record(&self, app: &AppName) -> Result<Option<AppRecord>, DriverError> {
        Ok(read_record(&self.layout.app_record(app))?)
    }

    pub(crate) fn collect_images(&self) -> Result<(), DriverError> {
        Ok(image::collect(&self.layout, || {
            let mut used: HashSet<Digest> = HashSet::new();
            for app in self.layout.list_apps()? {
                for key in self.layout.list_instances(&app)? {
                    let record: Option<InstanceRecord> = read_record(&self.layout.instance(&key).record())?;
                    used.extend(record.map(|record| record.image));
                }
            }
            Ok(used)
        })?)
    }

    /// A uid that no app of this machine ever had.
    fn allocate_uid(&self) -> Result<u32, DriverError> {
        let _installation = FileLock::exclusive(&self.layout.installation_lock())?;
        let uid = Machine::lock()?.give_uid()?;
        write_record(&self.layout.uids(), &(uid + 1))?;
        Ok(uid)
    }

    /// Tells the machine's record what this installation has; without anything, makes sure that there can be one.
    pub(crate) fn claim(&self) -> io::Result<()> {
        let Some(networks) = &self.networks else { return Ok(()) };
        if self.layout.list_apps()?.is_empty() {
            return Machine::lock().map(drop);
        }
        let mut slots = Vec::new();
        for app in self.layout.list_apps()? {
            for key in self.layout.list_instances(&app)? {
                let files = self.layout.instance(&key);
                let record: Option<InstanceRecord> = read_record(&files.record())?;
                slots.extend(record.as_ref().and_then(slot).map(|slot| (slot, files.directory().to_owned())));
            }
        }
        networks.claim(slots, read_record(&self.layout.uids())?)
    }
}
