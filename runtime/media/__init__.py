"""Files in, frames out: portraits, driving videos, CSVs, meshes, cameras, the video writer. No torch, no onnx.

Everything a user brings is read one item at a time and checked here; what is wrong raises `MediaError` on one line.
Pictures are uint8 RGB [H,W,3]; cameras are OpenCV in canonical head space (see DESIGN.md), `c2w` and `K` float64.

fit.py      Fit.between(source_height, source_width, height, width, fit="crop"|"pad", anchor_y=0.5, box=None) -> Fit
            Fit.apply(image) -> [height,width,3];  Fit.intrinsics(K [...,3,3]) -> K in pixels of the output
            crop_box("x,y,w,h") -> Box;  square_crop(image, size, box=None) -> [size,size,3];  resize(image, size)
portrait.py load_portrait(path, height, width, fit="crop", box=None, anchor_y=1/3) -> uint8 [height,width,3]
driving.py  open_driving(path, fps=None) -> DrivingClip: .path .fps .num_frames .video .coefficients (ArkitTable)
                .mesh .normals .cameras .sound (paths or None)
            parse_fps("29.97" | "30000/1001" | 25 | ...) -> Fraction
            VideoSource(path, fps=None), FrameFolder(path, fps=None): iterate -> frames;
                .fps .num_frames .height .width .has_sound
            read_arkit_csv(path, fps=None) -> ArkitTable: .coefficients [T,52] .head_rotation [T,3,3]|None .fps
                .num_frames .num_clamped; iterate -> [52].  Names: factorportrait.arkit.ARKIT_NAMES
streams.py  Stream(name, items, num_items=None, end="stop"|"loop"|"hold"), Stream.constant(name, item)
            Combined(streams, limit=None): .num_frames; iterate -> {name: item}
camera.py   Cameras(K [T,3,3], c2w [T,4,4]): len, .select(start, count)
            load_cameras(path, height, width, fit="crop", video_size=None) -> Cameras
            open_camera(spec, height, width, default_K, default_c2w, fps, fit="crop", video_size=None) -> CameraPath
            CameraPath: .name .freeze .num_frames .cameras(start, count) -> Cameras; iterate -> (K, c2w), endless
            ray_maps(K [T,3,3], c2w [T,4,4], height, width, stride=8) -> float32 [T,6,h,w]
mesh.py     open_mesh(path) -> MeshNpz | MeshObjFolder: .faces [F,3] .num_frames .num_vertices; iterate -> [V,3]
            PosedHead(path): .faces, .vertices(rotation [3,3], translation=None) -> float32 [V,3]
normals.py  NormalRenderer(height, width, device="cpu", supersample=1)(vertices, faces, K, c2w) -> uint8 [H,W,3]
            NormalVideo(path, height, width, fps=None, fit="crop"): .fps .num_frames .height .width; iterate -> uint8 [H,W,3]
writer.py   with VideoWriter(path, width, height, fps, audio_from=None) as writer: writer.write(frame)
            compose_side_by_side(reference, driving, output [H,W,3]) -> uint8 [H,3*W,3];  contact_sheet(frames, columns)
"""
