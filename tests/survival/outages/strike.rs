//! What the outage does to one VM, and what is done while it lasts.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use virtmark::outage::{self, End, Moment, Outage};
use virtmark::reason::Reason;
use virtmark_bed::{Vm, guest, wait_until};

use super::cell::Cell;

/// By what it is known that libvirt was asked.
#[derive(Clone, Copy)]
pub(super) enum Sign {
    /// A signal that it sends to QEMU is at the door: were QEMU let go before, it would answer what it was asked first.
    Signal,
    /// It sends none, and has had time to take its turn.
    Time,
}

impl Cell {
    /// What is done while the outage lasts.
    pub fn hit(&mut self, outage: Outage) -> Result<()> {
        self.strike(outage)?;
        self.start_at_once(outage)?;
        self.release()?;
        // without the API server, too
        if self.moment == Moment::Frozen && !outage.stops_the_vm() {
            self.is_thawed()?;
        }
        if (self.moment, outage) == (Moment::Beginning, Outage::Libvirtd) {
            // libvirtd's next start finds the VM off, and forgets the job that it lost track of
            self.phase(self.last()?, "Initializing", Some("VmBusy"))?;
            self.vm.destroy()?;
        }
        Ok(())
    }

    /// Takes this VM away.
    pub(super) fn strike(&mut self, outage: Outage) -> Result<()> {
        let is_off = self.moment == Moment::VmOff;
        match outage {
            Outage::Libvirtd | Outage::Etcd | Outage::ApiServer => Ok(()),
            Outage::PoweredOff | Outage::QemuKilled if is_off => Ok(()),
            Outage::Undefined => self.asked(Vm::undefine, Sign::Time),
            Outage::PoweredOff => self.asked(Vm::destroy, Sign::Signal),
            Outage::QemuKilled => self.vm.kill(),
        }
    }

    /// Asks libvirt for something while QEMU may stand still: it goes on once libvirt has been asked.
    pub(super) fn asked(&mut self, ask: impl FnOnce(&Vm) -> Result<()> + Send, sign: Sign) -> Result<()> {
        let stopped = self.stopped.take();
        let vm = &self.vm;
        std::thread::scope(|scope| {
            let asking = scope.spawn(move || ask(vm));
            if let Some(qemu) = stopped {
                let until = Instant::now() + Duration::from_millis(300);
                let asked = wait_until(Duration::from_secs(20), "libvirt to be asked", || {
                    let is_asked = match sign {
                        Sign::Signal => qemu.has_signals(),
                        Sign::Time => Instant::now() > until,
                    };
                    Ok(is_asked.then_some(()))
                });
                qemu.resume();
                asked?;
            }
            asking.join().map_err(|_| anyhow::anyhow!("the asker died"))?
        })
    }

    /// The guest, if there is one, is thawed. libvirt may be away meanwhile.
    pub fn is_thawed(&self) -> Result<()> {
        wait_until(Duration::from_secs(30), "the guest to be thawed", || {
            Ok(guest::is_frozen(&self.vm).is_ok_and(|frozen| !frozen).then_some(()))
        })
    }

    /// Starts the VM in the middle of its clean-up, where it was stopped and is not waited for.
    pub(super) fn start_at_once(&self, outage: Outage) -> Result<()> {
        let waits = matches!(outage::end(self.moment, outage), End::Waits(_))
            || outage::end(self.moment, outage) == End::Fails(Reason::VmNotFound);
        if outage.stops_the_vm() && !waits && self.moment != Moment::VmOff {
            self.start()?;
        }
        Ok(())
    }

    /// Starts the VM again, whatever of it is left.
    pub(super) fn start(&self) -> Result<()> {
        self.vm.start().context("the VM cannot be started at once")?;
        ensure!(self.vm.state()? == "running", "the VM was started, and does not run");
        Ok(())
    }
}
