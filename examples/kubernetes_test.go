package examples_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.yaml.in/yaml/v3"
)

// The parts of the manifest that the tests look at.
type (
	manifest struct {
		configMap  kubernetesConfigMap
		claim      kubernetesClaim
		deployment kubernetesDeployment
		service    kubernetesService
	}

	kubernetesMetadata struct {
		Name   string            `yaml:"name"`
		Labels map[string]string `yaml:"labels"`
	}

	kubernetesConfigMap struct {
		Metadata kubernetesMetadata `yaml:"metadata"`
		Data     map[string]string  `yaml:"data"`
	}

	kubernetesClaim struct {
		Metadata kubernetesMetadata `yaml:"metadata"`
		Spec     struct {
			AccessModes []string `yaml:"accessModes"`
		} `yaml:"spec"`
	}

	kubernetesDeployment struct {
		Spec struct {
			Replicas int `yaml:"replicas"`
			Selector struct {
				MatchLabels map[string]string `yaml:"matchLabels"`
			} `yaml:"selector"`
			Template struct {
				Metadata kubernetesMetadata `yaml:"metadata"`
				Spec     kubernetesPod      `yaml:"spec"`
			} `yaml:"template"`
		} `yaml:"spec"`
	}

	kubernetesPod struct {
		TerminationGracePeriodSeconds int                   `yaml:"terminationGracePeriodSeconds"`
		Containers                    []kubernetesContainer `yaml:"containers"`
		Volumes                       []kubernetesVolume    `yaml:"volumes"`
	}

	kubernetesContainer struct {
		Command []string `yaml:"command"`
		Env     []struct {
			Name  string `yaml:"name"`
			Value string `yaml:"value"`
		} `yaml:"env"`
		Ports []struct {
			Name          string `yaml:"name"`
			ContainerPort int    `yaml:"containerPort"`
		} `yaml:"ports"`
		ReadinessProbe kubernetesProbe `yaml:"readinessProbe"`
		LivenessProbe  kubernetesProbe `yaml:"livenessProbe"`
		VolumeMounts   []struct {
			Name      string `yaml:"name"`
			MountPath string `yaml:"mountPath"`
		} `yaml:"volumeMounts"`
	}

	kubernetesProbe struct {
		HTTPGet struct {
			Path string `yaml:"path"`
			Port string `yaml:"port"`
		} `yaml:"httpGet"`
	}

	kubernetesVolume struct {
		Name      string `yaml:"name"`
		Projected *struct {
			Sources []struct {
				ConfigMap kubernetesMetadata `yaml:"configMap"`
			} `yaml:"sources"`
		} `yaml:"projected"`
		Secret *struct {
			SecretName string `yaml:"secretName"`
		} `yaml:"secret"`
		PersistentVolumeClaim *struct {
			ClaimName string `yaml:"claimName"`
		} `yaml:"persistentVolumeClaim"`
		EmptyDir *struct{} `yaml:"emptyDir"`
	}

	kubernetesService struct {
		Spec struct {
			Selector map[string]string `yaml:"selector"`
			Ports    []struct {
				Port       int    `yaml:"port"`
				TargetPort string `yaml:"targetPort"`
			} `yaml:"ports"`
		} `yaml:"spec"`
	}
)

// readManifest reads the manifest, which has one object of each kind.
func readManifest(t *testing.T) (m manifest) {
	t.Helper()
	file, err := os.Open("kubernetes/fsbroker.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	missing := map[string]any{
		"v1 ConfigMap": &m.configMap, "v1 PersistentVolumeClaim": &m.claim, "apps/v1 Deployment": &m.deployment, "v1 Service": &m.service,
	}
	decoder := yaml.NewDecoder(file)
	for {
		var document yaml.Node
		if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		var object struct {
			APIVersion string `yaml:"apiVersion"`
			Kind       string `yaml:"kind"`
		}
		if err := document.Decode(&object); err != nil {
			t.Fatal(err)
		}
		kind := object.APIVersion + " " + object.Kind
		if missing[kind] == nil {
			t.Fatalf("unexpected or repeated: %s", kind)
		}
		if err := document.Decode(missing[kind]); err != nil {
			t.Fatal(err)
		}
		delete(missing, kind)
	}
	if len(missing) > 0 {
		t.Fatalf("there is no %q", slices.Collect(maps.Keys(missing)))
	}
	return m
}

// kubernetesCaddy is what the Caddyfile of the manifest adapts to, as far as the manifest must agree with it.
type kubernetesCaddy struct {
	Storage struct{ Module, Root string }
	Apps    struct {
		HTTP struct {
			HTTPPort      int           `json:"http_port"`
			HTTPSPort     int           `json:"https_port"`
			ShutdownDelay time.Duration `json:"shutdown_delay"`
			GracePeriod   time.Duration `json:"grace_period"`
			Servers       map[string]struct{ Listen []string }
		}
	}
}

// TestKubernetesManifest checks that the parts of the manifest fit together, and that the Caddyfile in it is valid. It does
// not check the manifest against Kubernetes.
func TestKubernetesManifest(t *testing.T) {
	t.Parallel()
	m := readManifest(t)
	file := filepath.Join(t.TempDir(), "Caddyfile")
	text := m.configMap.Data["Caddyfile"]
	writeFile(t, file, text)
	testCaddyfile(t, file)
	var config kubernetesCaddy
	if err := json.Unmarshal(caddy(t, nil, "adapt", "--config", file), &config); err != nil {
		t.Fatal(err)
	}

	spec := m.deployment.Spec
	pod := spec.Template.Spec
	container := pod.Containers[0]
	if !maps.Equal(spec.Selector.MatchLabels, spec.Template.Metadata.Labels) || !maps.Equal(m.service.Spec.Selector, spec.Template.Metadata.Labels) {
		t.Errorf("the labels %v are not those of the selectors %v and %v", spec.Template.Metadata.Labels, spec.Selector.MatchLabels, m.service.Spec.Selector)
	}
	if spec.Replicas < 2 || !slices.Contains(m.claim.Spec.AccessModes, "ReadWriteMany") {
		t.Errorf("%d replicas cannot share a volume that is %v", spec.Replicas, m.claim.Spec.AccessModes)
	}

	// The storage tier may need a minute after the grace period to store what is queued.
	http := config.Apps.HTTP
	if want := http.ShutdownDelay + http.GracePeriod + time.Minute; time.Duration(pod.TerminationGracePeriodSeconds)*time.Second < want || http.GracePeriod == 0 {
		t.Errorf("the Pod has %d s to stop, and Caddy needs %v", pod.TerminationGracePeriodSeconds, want)
	}

	// Everything that Caddy reads or writes is in the volume that is meant for it.
	volume := func(file string) (v kubernetesVolume) {
		for _, mount := range container.VolumeMounts {
			if mount.MountPath == path.Dir(file) {
				i := slices.IndexFunc(pod.Volumes, func(v kubernetesVolume) bool { return v.Name == mount.Name })
				if i < 0 {
					t.Errorf("there is no volume %s", mount.Name)
					return v
				}
				return pod.Volumes[i]
			}
		}
		t.Errorf("%s is not mounted", path.Dir(file))
		return v
	}
	secrets := placeholder.FindAllString(text, -1)
	for _, secret := range secrets {
		if v := volume(strings.TrimSuffix(strings.TrimPrefix(secret, "{file."), "}")); v.Secret == nil {
			t.Errorf("%s is not a secret", secret)
		}
	}
	if len(secrets) != 3 {
		t.Errorf("the secrets are %q", secrets)
	}
	if v := volume(config.Storage.Root + "/x"); v.PersistentVolumeClaim == nil || v.PersistentVolumeClaim.ClaimName != m.claim.Metadata.Name {
		t.Errorf("the storage %s is not shared", config.Storage.Root)
	}
	for _, file := range []string{container.Command[len(container.Command)-1], "/etc/caddy/upstreams.crt"} {
		if v := volume(file); v.Projected == nil || v.Projected.Sources[0].ConfigMap.Name != m.configMap.Metadata.Name {
			t.Errorf("%s is not from the ConfigMap", file)
		}
	}
	if env := container.Env[0]; env.Name != "XDG_DATA_HOME" || volume(env.Value+"/caddy").EmptyDir == nil {
		t.Errorf("%s is not a directory of its own for each replica", env.Value)
	}

	// The Service and the probes find the ports on which Caddy listens.
	ports := make(map[string]int)
	for _, port := range container.Ports {
		ports[port.Name] = port.ContainerPort
	}
	if want := map[string]int{"http": http.HTTPPort, "https": http.HTTPSPort, "probes": 8081}; !maps.Equal(ports, want) {
		t.Errorf("the container has the ports %v, want %v", ports, want)
	}
	var listens []string
	for _, server := range http.Servers {
		listens = append(listens, server.Listen...)
	}
	for _, port := range []string{"https", container.ReadinessProbe.HTTPGet.Port, container.LivenessProbe.HTTPGet.Port} {
		if !slices.Contains(listens, fmt.Sprint(":", ports[port])) {
			t.Errorf("Caddy does not listen on the port %s: %q", port, listens)
		}
	}
	for _, port := range m.service.Spec.Ports {
		if ports[port.TargetPort] == 0 || port.TargetPort == "probes" {
			t.Errorf("the Service has the port %d for %q", port.Port, port.TargetPort)
		}
	}
}

// TestKubernetesReplicas runs two replicas with the Caddyfile of the manifest.
func TestKubernetesReplicas(t *testing.T) {
	t.Parallel()
	m := readManifest(t)
	var forgotten atomic.Bool
	node := startUpstream(t, func(w http.ResponseWriter, _ *http.Request) {
		if forgotten.Load() {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		_, _ = io.WriteString(w, `{"processTime":1,"result":{"taskReference":{"state":"SUCCESS"}}}`)
	})
	shared := filepath.ToSlash(t.TempDir())

	one, other := startReplica(t, m, node.URL, shared), startReplica(t, m, node.URL, shared)
	const task = "/task?appServerID=node-1&taskID=1"
	for _, r := range []*replica{one, other} {
		if status := get(t, r.probes+m.deployment.Spec.Template.Spec.Containers[0].ReadinessProbe.HTTPGet.Path, "", "").StatusCode; status != http.StatusOK {
			t.Errorf("the probe gets %d", status)
		}
	}
	if a, b := one.id(t), other.id(t); a == b {
		t.Errorf("both replicas have the ID %s", a)
	}
	if got := get(t, one.site+task, one.secret, ""); got.StatusCode != http.StatusOK {
		t.Errorf("the first replica: %d %s", got.StatusCode, got.body)
	}

	// It goes on for a while after it was told to stop, and stores the report before it ends.
	one.stop()
	one.waitFor("shutdown scheduled")
	got, err := tryGet(t, one.site+task, one.secret, "")
	answered := time.Now()
	if served := err == nil && got.StatusCode == http.StatusOK; !served && answered.Before(loggedAt(t, one.waitFor("servers shutting down"))) {
		t.Errorf("while it stops: %v, %+v", err, got)
	}
	one.waitFor("shutdown complete")
	forgotten.Store(true)
	if got := get(t, other.site+task, other.secret, ""); got.StatusCode != http.StatusOK || got.Header.Get("Cache-Status") != "fsbroker; hit; detail=storage" {
		t.Errorf("the second replica: %d %q %s", got.StatusCode, got.Header.Get("Cache-Status"), got.body)
	}
}

// replica is a Caddy with the Caddyfile of the manifest.
type replica struct {
	*process
	site, probes, admin string // URLs
	secret              string
	data                string // the data directory
}

// startReplica starts a replica with addresses and folders of this machine.
func startReplica(t *testing.T, m manifest, node, shared string) *replica {
	t.Helper()
	admin := freeAddress(t)
	r := &replica{site: "http://" + freeAddress(t), probes: "http://" + freeAddress(t), admin: "http://" + admin, data: t.TempDir()}
	text := m.configMap.Data["Caddyfile"]
	for _, edit := range [][2]string{
		{"\n:8081 {", "\n" + r.probes + " {"},
		{"/shared", `"` + shared + `"`},
		{"https://10.0.0.11:22001", node},
		{"10.0.0.10:23001", freeAddress(t)},
	} {
		if strings.Count(text, edit[0]) != 1 {
			t.Fatalf("the Caddyfile does not have %q once", edit[0])
		}
		text = strings.Replace(text, edit[0], edit[1], 1)
	}
	file := filepath.Join(t.TempDir(), "Caddyfile")
	writeFile(t, file, text)
	config, secrets := withSecrets(t, caddy(t, []string{"FSBROKER_DOMAIN=" + r.site}, "adapt", "--config", file))
	r.secret = secrets["portal"]
	r.process = startCaddy(t, []string{"XDG_DATA_HOME=" + r.data, "CADDY_ADMIN=" + admin}, config)
	return r
}

// loggedAt returns the time of a line of the log.
func loggedAt(t *testing.T, line string) time.Time {
	t.Helper()
	var entry struct{ TS float64 }
	if err := json.Unmarshal([]byte(line), &entry); err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	return time.UnixMicro(int64(entry.TS * 1e6))
}

// id returns the ID of the instance. Caddy makes it when it already serves, before it looks for certificates that are over.
func (r *replica) id(t *testing.T) (id string) {
	t.Helper()
	r.eventually("the instance has an ID", func() bool {
		content, _ := os.ReadFile(filepath.Join(r.data, "caddy", "instance.uuid"))
		id = string(content)
		return uuid.Validate(id) == nil // it may be written just now
	})
	return id
}

// stop tells the replica to stop, as a signal does. It does not wait for the response, which comes when the replica has
// stopped.
func (r *replica) stop() {
	go func() {
		if response, err := http.Post(r.admin+"/stop", "", nil); err == nil {
			response.Body.Close()
		}
	}()
}
