//! Templates: names that point at images. A template is built once, saved under its name, and forked by it.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use types::FullName;
use vm::class::Devices;

use super::{ImageView, Service, log_progress};
use crate::node::engine::{EngineError, ErrorKind};
use crate::node::error::NodeError;
use crate::node::guest::template::{BuildOrder, Stage, StageTime};
use crate::node::registry::{Image, Origin};

/// A template that is being built.
#[derive(Clone, Copy, Debug)]
pub struct Building {
    /// What it is at.
    pub stage: Stage,
    /// Since when.
    pub since: Instant,
}

/// A template.
#[derive(Clone, Debug)]
pub struct TemplateView {
    /// Its name.
    pub name: FullName,
    /// The image in memory that it points at, if it is there.
    pub image: Option<ImageView>,
    /// Bytes of its file in the store, if it is saved.
    pub file_bytes: Option<u64>,
    /// What it is at, if it is being built.
    pub building: Option<Building>,
}

impl Service {
    /// Builds a template, and saves it.
    ///
    /// # Errors
    /// [`NodeError`]; there is no such template then, and nothing is left behind.
    pub fn build_template(&self, name: &FullName, order: &BuildOrder) -> Result<ImageView, NodeError> {
        self.check_free(name)?;
        {
            let mut builds = self.builds.lock().unwrap_or_else(PoisonError::into_inner);
            if builds.contains_key(name) {
                return Err(name_taken(name, "is being built"));
            }
            builds.insert(name.clone(), Building { stage: Stage::Load, since: Instant::now() });
        }
        let _no_longer = super::OnDrop(|| {
            self.builds.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        });
        let at = |stage: Stage| {
            tracing::info!(template = %name, ?stage, "building");
            let mut builds = self.builds.lock().unwrap_or_else(PoisonError::into_inner);
            builds.insert(name.clone(), Building { stage, since: Instant::now() });
        };
        let (facts, mut times) = self.engine.build(order, &name.tenant, &mut |stage| at(stage))?;
        at(Stage::Save);
        let began = Instant::now();
        let id = facts.id;
        let saved = self.engine.save(id, name, &mut log_progress("template", name));
        let facts = match saved {
            Ok(facts) => facts,
            Err(error) => {
                // Its name points at nothing, so nobody would find it.
                self.engine.forget(id)?;
                return Err(error.into());
            }
        };
        times.push(StageTime { stage: Stage::Save, took: began.elapsed() });
        let image = Image {
            facts,
            origin: Origin::Template,
            name: Some(name.clone()),
            created: pages::clock::wall(),
            built: Arc::from(times),
        };
        Ok(self.view(self.registry.add_image(image)))
    }

    /// All templates: names in the store, and those that are being built.
    ///
    /// # Errors
    /// [`NodeError::Engine`] if the store cannot be read.
    pub fn templates(&self) -> Result<Vec<TemplateView>, NodeError> {
        let mut views: Vec<TemplateView> = self
            .engine
            .stored()?
            .into_iter()
            .map(|(name, bytes)| TemplateView {
                image: self.named_image(&name).map(|image| self.view(image)),
                building: None,
                file_bytes: Some(bytes),
                name,
            })
            .collect();
        let builds = self.builds.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let being_built = |(name, building)| TemplateView { name, image: None, file_bytes: None, building: Some(building) };
        views.extend(builds.into_iter().map(being_built));
        Ok(views)
    }

    /// One template.
    ///
    /// # Errors
    /// [`NodeError`] if there is none.
    pub fn template(&self, name: &FullName) -> Result<TemplateView, NodeError> {
        self.templates()?.into_iter().find(|view| view.name == *name).ok_or_else(|| unknown(name))
    }

    /// Removes a template, from memory and store. Machines that were forked from it go on.
    ///
    /// # Errors
    /// [`NodeError`] if there is none.
    pub fn remove_template(&self, name: &FullName) -> Result<(), NodeError> {
        let mut image = None;
        while let Some(next) = self.named_image(name) {
            self.forget_image(next.facts.id)?;
            image = Some(next);
        }
        match self.delete(name) {
            Err(NodeError::Engine(EngineError { kind: ErrorKind::UnknownImage, .. })) if image.is_some() => Ok(()),
            Err(NodeError::Engine(EngineError { kind: ErrorKind::UnknownImage, .. })) => Err(unknown(name)),
            removed => removed,
        }
    }

    /// The file of a template, to read.
    ///
    /// # Errors
    /// [`NodeError`] if there is none.
    pub fn export_template(&self, name: &FullName) -> Result<File, NodeError> {
        match self.engine.export(name) {
            Err(EngineError { kind: ErrorKind::UnknownImage, .. }) => Err(unknown(name)),
            exported => Ok(exported?),
        }
    }

    /// Takes in a template that was exported elsewhere.
    ///
    /// # Errors
    /// [`NodeError`]; there is no such template then.
    pub fn import_template(&self, name: &FullName, archive: &mut dyn Read) -> Result<(), NodeError> {
        let facts = self.engine.import(name, archive)?;
        self.note_image(facts, Origin::Store, Some(name.clone()));
        Ok(())
    }

    /// A stream to the agent of a running Linux guest that knows who it is.
    ///
    /// # Errors
    /// [`NodeError`] if there is no such machine, it has no agent, or has not been told who it is.
    pub fn connect(&self, given: &str) -> Result<UnixStream, NodeError> {
        let id = self.registry.running_machine(given)?;
        // A machine without an agent says so; of one that has one, its streams are first for who tells it who it is.
        let image = self.registry.machine(&id.to_string())?;
        let has_agent = self.engine.image(image.image).is_ok_and(|facts| facts.class.devices() != Devices::None);
        if has_agent && image.readiness.is_none() {
            return Err(NodeError::NotReady { id: id.to_string() });
        }
        Ok(self.engine.connect(id)?)
    }

    /// Steps after a fork that children leave out: none, but in the tests that show what each is for.
    pub(super) fn left_out_steps() -> Vec<String> {
        #[cfg(feature = "testing")]
        if let Ok(steps) = std::env::var("FARFORK_TEST_LEAVE_OUT") {
            return steps.split(',').map(str::to_owned).collect();
        }
        Vec::new()
    }

    /// The image that a template points at.
    pub(super) fn template_image(&self, name: &FullName) -> Result<Image, NodeError> {
        // One load, however many ask at once.
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = self.named_image(name) {
            return Ok(image);
        }
        match self.load(name) {
            Ok(view) => Ok(view.image),
            Err(NodeError::Engine(EngineError { kind: ErrorKind::UnknownImage, .. })) => Err(unknown(name)),
            Err(error) => Err(error),
        }
    }

    /// The newest image in memory of this name.
    pub(super) fn named_image(&self, name: &FullName) -> Option<Image> {
        self.registry.images().into_iter().rev().find(|image| image.name.as_ref() == Some(name))
    }

    fn check_free(&self, name: &FullName) -> Result<(), NodeError> {
        let is_taken = self.engine.stored()?.iter().any(|(stored, _)| stored == name);
        if is_taken { Err(name_taken(name, "exists")) } else { Ok(()) }
    }
}

fn unknown(name: &FullName) -> NodeError {
    NodeError::UnknownTemplate { name: name.to_string() }
}

fn name_taken(name: &FullName, why: &str) -> NodeError {
    NodeError::Engine(EngineError {
        kind: ErrorKind::NameTaken,
        message: format!("a template called {name} {why}"),
        remedy: "take another name, or remove that one (farfork template rm)".to_owned(),
    })
}
